#include "gather_scatter.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../cpu/gather_scatter_kernel.h"
#include "indices.h"
#include "parallel.h"

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

cpu::GatherScatter job_of(const Tensor& dense, const Tensor& indices, const Tensor& values, bool writable) {
  return {const_cast<void*>(dense.const_data_ptr()), const_cast<void*>(values.const_data_ptr()),
          static_cast<int>(dense.element_size()), strided_of(dense, writable, "dense"),
          indices_of(indices, dense.numel(), "indices")};
}

Tensor gather(const Tensor& dense, const Tensor& indices) {
  check_cpu(dense, "dense");
  check_floating(dense);
  const int64_t n = indices.numel();
  Tensor values = torch::stable::new_empty(dense, {n});
  const cpu::GatherScatter job = job_of(dense, indices, values, false);
  parallel_for_entries(n, [&](int64_t begin, int64_t end) { cpu::gather_scatter_kernels().gather(job, begin, end); });
  return values;
}

void scatter_(const Tensor& dense, const Tensor& indices, const Tensor& values) {
  check_cpu(dense, "dense");
  check_floating(dense);
  check_vector(values, dense.scalar_type(), indices.numel(), "values");
  const cpu::GatherScatter job = job_of(dense, indices, values, true);
  parallel_for_entries(indices.numel(),
                       [&](int64_t begin, int64_t end) { cpu::gather_scatter_kernels().scatter(job, begin, end); });
}

}  // namespace
}  // namespace saft

STABLE_TORCH_LIBRARY_IMPL(saft_kernels, CPU, m) {
  m.impl("gather", TORCH_BOX(&saft::gather));
  m.impl("scatter_", TORCH_BOX(&saft::scatter_));
}
