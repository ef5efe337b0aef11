#include "gather_scatter.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../cpu/gather_scatter_kernel.h"
#include "indices.h"

namespace saft {
namespace {

constexpr int64_t kGrain = 2048;  // entries below which a second thread costs more than it brings

void check_floating(const Tensor& dense) {
  const ScalarType type = dense.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || is_low_precision(type),
                  "dense must be float64, float32, bfloat16 or float16, not ", name_of(type));
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
  torch::stable::parallel_for(
      0, n, kGrain, [&](int64_t begin, int64_t end) { cpu::gather_scatter_kernels().gather(job, begin, end); });
  return values;
}

void scatter_(const Tensor& dense, const Tensor& indices, const Tensor& values) {
  check_cpu(dense, "dense");
  check_floating(dense);
  check_vector(values, dense.scalar_type(), indices.numel(), "values");
  const cpu::GatherScatter job = job_of(dense, indices, values, true);
  torch::stable::parallel_for(0, indices.numel(), kGrain, [&](int64_t begin, int64_t end) {
    cpu::gather_scatter_kernels().scatter(job, begin, end);
  });
}

}  // namespace
}  // namespace saft

STABLE_TORCH_LIBRARY_IMPL(saft_kernels, CPU, m) {
  m.impl("gather", TORCH_BOX(&saft::gather));
  m.impl("scatter_", TORCH_BOX(&saft::scatter_));
}
