#include "../ops/sampled_grad.h"

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>

#include "device.h"
#include "sampled_grad_kernel.h"

namespace saft::cuda {
namespace {

Tensor pack_columns(const Tensor& x, const Tensor& columns, std::optional<ScalarType> dtype) {
  const Call call(x, "x");
  PackColumns job = check_pack_columns(x, columns, dtype, call.device());
  Tensor packed = new_empty(x, {blocks_of(job.x.tokens), job.n_columns, kTokens}, packed_type(x, dtype));
  job.packed = packed.mutable_data_ptr();
  check(launch_pack(job, call.stream()));
  return packed;
}

Tensor sampled_grad(const Tensor& packed, const Tensor& grad_output, const Tensor& rows, const Tensor& offsets,
                    const Tensor& columns, bool product) {
  const Call call(grad_output, "grad_output");
  SampledGrad job = check_sampled_grad(packed, grad_output, rows, offsets, columns, call.device());
  const ScalarType type = sum_type(job.grad_output.type);
  const TokenParts parts = product ? parts_of_product(job) : parts_of_entries(job);
  Tensor grad = new_empty(grad_output, {job.plan.n}, type);
  Tensor sums = parts.count == 1 ? grad : new_empty(grad_output, {parts.count, job.plan.n}, type);
  job.grad = sums.mutable_data_ptr();
  check(product ? launch_product(job, parts, call.stream()) : launch_entries(job, parts, call.stream()));
  if (parts.count > 1)
    check(launch_sum_parts(job.grad_output.type, job.grad, parts.count, job.plan.n, grad.mutable_data_ptr(),
                           call.stream()));
  return grad;
}

struct Sorted {
  Tensor values;
  Tensor order;
};

// torch's own sort, CUB's underneath: equal values keep their order, which torch::stable::sort (torch 2.15) does not
// promise. Not by that name, which a call would find as well.
Sorted sort_in_order(const Tensor& vector) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  constexpr int64_t kDim = 0;
  std::array<StableIValue, 4> stack{from(vector), from(std::optional<bool>(true)), from(kDim), from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

Tensor sampled_embedding_grad(const Tensor& tokens, const Tensor& grad_output, const Tensor& rows,
                              const Tensor& offsets, const Tensor& columns) {
  const Call call(grad_output, "grad_output");
  SampledEmbeddingGrad job = check_sampled_embedding_grad(tokens, grad_output, rows, offsets, columns, call.device());
  Tensor found = new_empty(tokens, {job.grad_output.tokens}, ScalarType::Int);
  check(launch_find_rows(job, found.mutable_data_ptr<int32_t>(), call.stream()));
  const Sorted sorted = sort_in_order(found);
  Tensor grad = new_empty(grad_output, {job.plan.n}, sum_type(job.grad_output.type));
  job.grad = grad.mutable_data_ptr();
  check(launch_sum_tokens(job, {sorted.values.const_data_ptr<int32_t>(), sorted.order.const_data_ptr<int64_t>()},
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
