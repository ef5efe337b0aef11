#include "../ops/gather_scatter.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "gather_scatter_kernel.h"
#include "index_values.h"
#include "parallel.h"

namespace saft::cpu {
namespace {

Tensor gather(const Tensor& dense, const Tensor& indices) {
  Tensor values = torch::stable::new_empty(dense, {indices.numel()});
  const GatherScatter job = check_gather(dense, indices, values, kCpu);
  require_increase_below(job.indices, job.numel, "indices");
  parallel_for_entries(job.indices.n,
                       [&](int64_t begin, int64_t end) { gather_scatter_kernels().gather(job, begin, end); });
  return values;
}

void scatter_(const Tensor& dense, const Tensor& indices, const Tensor& values) {
  const GatherScatter job = check_scatter(dense, indices, values, kCpu);
  require_increase_below(job.indices, job.numel, "indices");
  parallel_for_entries(job.indices.n,
                       [&](int64_t begin, int64_t end) { gather_scatter_kernels().scatter(job, begin, end); });
}

}  // namespace
}  // namespace saft::cpu

STABLE_TORCH_LIBRARY_IMPL(saft_kernels, CPU, m) {
  m.impl("gather", TORCH_BOX(&saft::cpu::gather));
  m.impl("scatter_", TORCH_BOX(&saft::cpu::scatter_));
}
