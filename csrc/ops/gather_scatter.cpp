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
  return job_of(dense, indices, values, device, true);
}

}  // namespace saft
