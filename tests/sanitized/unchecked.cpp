// The kernel of scatter_ without the checks that stand before it, so that a caller can make it do what sanitizers must
// report: leave a tensor, overflow, or let two threads write to one place. `make sanitize` begins with that; a
// sanitizer that does not see it would see nothing else.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../../csrc/cpu/gather_scatter_kernel.h"
#include "../../csrc/ops/indices.h"

namespace saft {
namespace {

// dense[indices[i] * stride] = values[i], wherever that is; threads take equal shares of the entries.
void scatter_(const Tensor& dense, const Tensor& indices, const Tensor& values, int64_t stride) {
  GatherScatter job{dense.mutable_data_ptr(),
                    values.mutable_data_ptr(),
                    static_cast<int>(dense.element_size()),
                    dense.numel(),
                    {},
                    index_vector(indices, kCpu, "indices")};
  job.layout.dims = 1;
  job.layout.sizes[0] = std::numeric_limits<int64_t>::max();
  job.layout.strides[0] = stride;
  torch::stable::parallel_for(
      0, job.indices.n, 1, [&](int64_t begin, int64_t end) { cpu::gather_scatter_kernels().scatter(job, begin, end); });
}

}  // namespace
}  // namespace saft

STABLE_TORCH_LIBRARY(saft_sanitized, m) {
  m.def("scatter_(Tensor(a!) dense, Tensor indices, Tensor values, int stride) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(saft_sanitized, CPU, m) {
  m.impl("scatter_", TORCH_BOX(&saft::scatter_));
}
