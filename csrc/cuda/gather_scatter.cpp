#include "../ops/gather_scatter.h"

#include "device.h"
#include "gather_scatter_kernel.h"

namespace saft::cuda {
namespace {

Tensor gather(const Tensor& dense, const Tensor& indices) {
  const Call call(dense, "dense");
  Tensor values = new_empty(dense, {indices.numel()}, dense.scalar_type());
  check(launch_gather(check_gather(dense, indices, values, call.device()), call.stream()));
  return values;
}

void scatter_(const Tensor& dense, const Tensor& indices, const Tensor& values) {
  const Call call(dense, "dense");
  check(launch_scatter(check_scatter(dense, indices, values, call.device()), call.stream()));
}

}  // namespace
}  // namespace saft::cuda

STABLE_TORCH_LIBRARY_IMPL(SAFT_GPU_LIBRARY, SAFT_GPU_KEY, m) {
  m.impl("gather", TORCH_BOX(&saft::cuda::gather));
  m.impl("scatter_", TORCH_BOX(&saft::cuda::scatter_));
}
