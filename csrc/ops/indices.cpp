#include "indices.h"

namespace saft {
namespace {

// Merges adjacent dimensions that are one stretch of memory; what is left is what a place costs to compute.
Strided merged(const Tensor& dense, const char* name) {
  Strided layout;
  for (int64_t d = 0; d < dense.dim(); ++d) {
    const int64_t size = dense.size(d), stride = dense.stride(d);
    if (size == 1) continue;
    const int last = layout.dims - 1;
    if (last >= 0 && layout.strides[last] == size * stride) {
      layout.sizes[last] *= size;
      layout.strides[last] = stride;
      continue;
    }
    STD_TORCH_CHECK(layout.dims < kMaxDims, name, " has more than ", kMaxDims, " separate dimensions");
    layout.sizes[layout.dims] = size;
    layout.strides[layout.dims] = stride;
    ++layout.dims;
  }
  return layout;
}

// Whether elements may share a place: some stride does not step over all that the smaller strides reach.
bool overlaps(const Strided& layout) {
  int order[kMaxDims];  // of the dimensions, by stride; each is put into its place among those before it
  for (int d = 0; d < layout.dims; ++d) {
    int place = d;
    for (; place > 0 && layout.strides[order[place - 1]] > layout.strides[d]; --place) order[place] = order[place - 1];
    order[place] = d;
  }
  int64_t reach = 0;
  for (int i = 0; i < layout.dims; ++i) {
    const int d = order[i];
    if (layout.strides[d] <= reach) return true;
    reach += (layout.sizes[d] - 1) * layout.strides[d];
  }
  return false;
}

}  // namespace

Strided strided_of(const Tensor& dense, bool writable, const char* name) {
  if (dense.is_contiguous()) return {};
  Strided layout = merged(dense, name);
  STD_TORCH_CHECK(!writable || dense.numel() == 0 || !overlaps(layout), name,
                  " is expanded or overlaps itself: several elements share one place in memory");
  return layout;
}

Indices index_vector(const Tensor& indices, Device device, const char* name) {
  check_device(indices, device, name);
  const ScalarType type = indices.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, name, " must be int32 or int64, not ",
                  name_of(type));
  STD_TORCH_CHECK(indices.dim() == 1 && indices.is_contiguous(), name, " must be a contiguous vector");
  return {indices.const_data_ptr(), type == ScalarType::Long, indices.numel()};
}

const int32_t* int32_vector(const Tensor& indices, Device device, const char* name) {
  check_vector(indices, device, ScalarType::Int, name);
  return indices.const_data_ptr<int32_t>();
}

}  // namespace saft
