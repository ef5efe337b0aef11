#include "../ops/sampled_grad.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <utility>

#include "device.h"
#include "sampled_grad_kernel.h"

namespace saft::cuda {
namespace {

Tensor pack_columns(const Tensor& x, const Tensor& columns) {
  const Call call(x, "x");
  PackColumns job = check_pack_columns(x, columns, call.device());
  Tensor packed = new_empty(x, {blocks_of(job.x.tokens), job.n_columns, kTokens}, x.scalar_type());
  job.packed = packed.mutable_data_ptr();
  check(launch_pack_columns(job, call.stream()));
  return packed;
}

Tensor sampled_grad(const Tensor& packed, const Tensor& grad_output, const Tensor& rows, const Tensor& offsets,
                    const Tensor& columns) {
  const Call call(grad_output, "grad_output");
  SampledGrad job = check_sampled_grad(packed, grad_output, rows, offsets, columns, call.device());
  const ScalarType type = sum_type(job.grad_output.type);
  const SampledStrategy strategy = strategy_of(job);
  Tensor grad = new_empty(grad_output, {job.plan.n}, type);
  Tensor partial = new_empty(grad_output, {strategy.parts > 1 ? strategy.parts : 0, job.plan.n}, type);
  job.grad = grad.mutable_data_ptr();
  check(launch_sampled_grad(job, strategy, partial.mutable_data_ptr(), call.stream()));
  return grad;
}

// The values in ascending order, equal ones in the order in which they were, and where they were.
std::pair<Tensor, Tensor> stable_sort(const Tensor& values) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(values),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

Tensor sampled_embedding_grad(const Tensor& tokens, const Tensor& grad_output, const Tensor& rows,
                              const Tensor& offsets, const Tensor& columns) {
  const Call call(grad_output, "grad_output");
  SampledEmbeddingGrad job = check_sampled_embedding_grad(tokens, grad_output, rows, offsets, columns, call.device());
  Tensor grad = new_empty(grad_output, {job.plan.n}, sum_type(job.grad_output.type));
  job.grad = grad.mutable_data_ptr();
  Tensor found = new_empty(tokens, {tokens.numel()}, ScalarType::Int);
  check(launch_find_rows(job, found.mutable_data_ptr<int32_t>(), call.stream()));
  const auto [sorted, order] = stable_sort(found);
  check(launch_sampled_embedding_grad(job, sorted.const_data_ptr<int32_t>(), order.const_data_ptr<int64_t>(),
                                      call.stream()));
  return grad;
}

}  // namespace
}  // namespace saft::cuda

STABLE_TORCH_LIBRARY_IMPL(SAFT_GPU_LIBRARY, SAFT_GPU_KEY, m) {
  m.impl("pack_columns", TORCH_BOX(&saft::cuda::pack_columns));
  m.impl("sampled_grad", TORCH_BOX(&saft::cuda::sampled_grad));
  m.impl("sampled_embedding_grad", TORCH_BOX(&saft::cuda::sampled_embedding_grad));
}
