#include "../ops/accumulate_topk.h"

#include "accumulate_topk_kernel.h"
#include "device.h"

namespace saft::cuda {
namespace {

void accumulate_topk_(const Tensor& acc, const std::optional<Tensor>& grad, double scale, bool square, int64_t key,
                      int64_t offset, int64_t k, const Tensor& values, const Tensor& positions, const Tensor& state) {
  const Call call(acc, "acc");
  const Scan scan = check_scan(acc, grad, scale, square, key, offset, call.device());
  const TopkBuffer buffer = check_topk_buffer(k, values, positions, state, call.device());
  check(launch_accumulate_topk(scan, buffer, call.stream()));
}

void compact_topk_(int64_t k, const Tensor& values, const Tensor& positions, const Tensor& state) {
  const Call call(values, "values");
  check(launch_compact_topk(check_topk_buffer(k, values, positions, state, call.device()), call.stream()));
}

}  // namespace
}  // namespace saft::cuda

STABLE_TORCH_LIBRARY_IMPL(SAFT_GPU_LIBRARY, SAFT_GPU_KEY, m) {
  m.impl("accumulate_topk_", TORCH_BOX(&saft::cuda::accumulate_topk_));
  m.impl("compact_topk_", TORCH_BOX(&saft::cuda::compact_topk_));
}
