#include "gather_scatter.h"

#include "indices.h"

namespace saft {
namespace {

void check_floating(const Tensor& dense) {
  switch (dense.scalar_type()) {
    case ScalarType::Double:
    case ScalarType::Float:
    case ScalarType::BFloat16:
    case ScalarType::Half:
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e5m2:
    case ScalarType::Float8_e4m3fnuz:
    case ScalarType::Float8_e5m2fnuz:
      return;
    default:
      STD_TORCH_CHECK(false, "dense must be of a floating type of one to eight bytes, not ",
                      name_of(dense.scalar_type()));
  }
}

uintptr_t address_of(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
}

// Whether `dense` fills its memory in some order. If it has gaps, another tensor may lie in them.
bool has_no_gaps(const Tensor& dense) {
  int64_t reach = 1;
  for (int64_t d = 0; d < dense.dim(); ++d) reach += (dense.size(d) - 1) * dense.stride(d);
  return reach == dense.numel();
}

void check_apart(const Tensor& dense, const Tensor& values) {
  const uintptr_t written = address_of(dense), read = address_of(values);
  const bool shared = values.numel() > 0 && read < written + dense.numel() * dense.element_size() &&
                      written < read + values.numel() * values.element_size();
  STD_TORCH_CHECK(!shared || !has_no_gaps(dense),
                  "values must not share memory with dense, which is written while they are read; give a copy");
}

GatherScatter job_of(const Tensor& dense, const Tensor& indices, const Tensor& values, Device device, bool writable) {
  check_device(dense, device, "dense");
  check_floating(dense);
  const Indices index = index_vector(indices, device, "indices");
  check_vector(values, device, dense.scalar_type(), index.n, "values");
  return {const_cast<void*>(dense.const_data_ptr()), const_cast<void*>(values.const_data_ptr()),
          static_cast<int>(dense.element_size()),    dense.numel(),
          strided_of(dense, writable, "dense"),      index};
}

}  // namespace

GatherScatter check_gather(const Tensor& dense, const Tensor& indices, const Tensor& values, Device device) {
  return job_of(dense, indices, values, device, false);
}

GatherScatter check_scatter(const Tensor& dense, const Tensor& indices, const Tensor& values, Device device) {
  const GatherScatter job = job_of(dense, indices, values, device, true);
  check_apart(dense, values);
  return job;
}

}  // namespace saft
