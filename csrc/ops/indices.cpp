#include "indices.h"

namespace saft {
namespace {

// Merges adjacent dimensions that are one stretch of memory; what is left is what a place costs to compute.
cpu::Strided merged(const Tensor& dense, const char* name) {
  cpu::Strided layout;
  for (int64_t d = 0; d < dense.dim(); ++d) {
    const int64_t size = dense.size(d), stride = dense.stride(d);
    if (size == 1) continue;
    const int last = layout.dims - 1;
    if (last >= 0 && layout.strides[last] == size * stride) {
      layout.sizes[last] *= size;
      layout.strides[last] = stride;
      continue;
    }
    STD_TORCH_CHECK(layout.dims < cpu::kMaxDims, name, " has more than ", cpu::kMaxDims, " separate dimensions");
    layout.sizes[layout.dims] = size;
    layout.strides[layout.dims] = stride;
    ++layout.dims;
  }
  return layout;
}

template <typename Index>
bool increasing_below(const Index* index, int64_t n, int64_t numel) {
  if (n == 0) return true;
  if (index[0] < 0 || index[n - 1] >= numel) return false;
  Index disorder = 0;  // as wide as an index: the compiler then compares whole vectors
  for (int64_t i = 1; i < n; ++i) disorder |= index[i - 1] >= index[i];
  return disorder == 0;
}

}  // namespace

cpu::Strided strided_of(const Tensor& dense, bool writable, const char* name) {
  check_cpu(dense, name);
  if (dense.is_contiguous()) return {};
  cpu::Strided layout = merged(dense, name);
  for (int d = 0; writable && d < layout.dims; ++d)
    STD_TORCH_CHECK(layout.strides[d] != 0, name, " is expanded: several elements share one place in memory");
  return layout;
}

cpu::Indices indices_of(const Tensor& indices, int64_t numel, const char* name) {
  check_cpu(indices, name);
  const ScalarType type = indices.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, name, " must be int32 or int64, not ",
                  name_of(type));
  STD_TORCH_CHECK(indices.dim() == 1 && indices.is_contiguous(), name, " must be a contiguous vector");
  const cpu::Indices view{indices.const_data_ptr(), type == ScalarType::Long, indices.numel()};
  const bool ok = view.wide ? increasing_below(static_cast<const int64_t*>(view.data), view.n, numel)
                            : increasing_below(static_cast<const int32_t*>(view.data), view.n, numel);
  STD_TORCH_CHECK(ok, name, " must increase strictly and lie within the tensor's ", numel, " elements");
  return view;
}

}  // namespace saft
