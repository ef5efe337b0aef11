#include "indices.h"

#include <algorithm>
#include <numeric>

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

// Whether elements may share a place: some stride does not step over all that the smaller strides reach.
bool overlaps(const cpu::Strided& layout) {
  int order[cpu::kMaxDims];
  std::iota(order, order + layout.dims, 0);
  std::sort(order, order + layout.dims, [&](int a, int b) { return layout.strides[a] < layout.strides[b]; });
  int64_t reach = 0;
  for (int i = 0; i < layout.dims; ++i) {
    const int d = order[i];
    if (layout.strides[d] <= reach) return true;
    reach += (layout.sizes[d] - 1) * layout.strides[d];
  }
  return false;
}

template <typename Index>
bool increase_below(const Index* index, int64_t begin, int64_t end, int64_t numel) {
  if (begin == end) return true;
  if (index[begin] < 0 || index[end - 1] >= numel) return false;
  Index disorder = 0;  // as wide as an index: the compiler then compares whole vectors
  for (int64_t i = std::max<int64_t>(begin, 1); i < end; ++i) disorder |= index[i - 1] >= index[i];
  return disorder == 0;
}

}  // namespace

cpu::Strided strided_of(const Tensor& dense, bool writable, const char* name) {
  check_cpu(dense, name);
  if (dense.is_contiguous()) return {};
  cpu::Strided layout = merged(dense, name);
  STD_TORCH_CHECK(!writable || dense.numel() == 0 || !overlaps(layout), name,
                  " is expanded or overlaps itself: several elements share one place in memory");
  return layout;
}

cpu::Indices index_vector(const Tensor& indices, const char* name) {
  check_cpu(indices, name);
  const ScalarType type = indices.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, name, " must be int32 or int64, not ",
                  name_of(type));
  STD_TORCH_CHECK(indices.dim() == 1 && indices.is_contiguous(), name, " must be a contiguous vector");
  return {indices.const_data_ptr(), type == ScalarType::Long, indices.numel()};
}

bool increase_below(const cpu::Indices& indices, int64_t begin, int64_t end, int64_t numel) {
  return indices.wide ? increase_below(static_cast<const int64_t*>(indices.data), begin, end, numel)
                      : increase_below(static_cast<const int32_t*>(indices.data), begin, end, numel);
}

void require_increase_below(bool holds, int64_t numel, const char* name) {
  STD_TORCH_CHECK(holds, name, " must increase strictly and lie within the tensor's ", numel, " elements");
}

cpu::Indices indices_of(const Tensor& indices, int64_t numel, const char* name) {
  const cpu::Indices view = index_vector(indices, name);
  require_increase_below(increase_below(view, 0, view.n, numel), numel, name);
  return view;
}

}  // namespace saft
