#include "accumulate_topk.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "../cpu/accumulate_topk.h"
#include "checks.h"

namespace saft {
namespace {

cpu::TopkBuffer check_buffer(int64_t k, const Tensor& values, const Tensor& positions, const Tensor& state) {
  check_vector(values, ScalarType::Float, "values");
  check_vector(positions, ScalarType::Long, "positions");
  check_vector(state, ScalarType::Long, "state");
  STD_TORCH_CHECK(state.numel() == kStateSize, "state must have ", int{kStateSize}, " elements, not ", state.numel());
  STD_TORCH_CHECK(values.numel() == positions.numel(), "values and positions must have the same length, not ",
                  values.numel(), " and ", positions.numel());
  STD_TORCH_CHECK(k >= 0, "k must not be negative, but is ", k);
  STD_TORCH_CHECK(k == 0 || values.numel() > k, "the buffer must hold more than k = ", k, " candidates, not ",
                  values.numel());
  int64_t* slots = state.mutable_data_ptr<int64_t>();
  STD_TORCH_CHECK(slots[kCount] >= 0 && slots[kCount] <= values.numel(), "state says ", slots[kCount],
                  " candidates, the buffer holds ", values.numel());
  STD_TORCH_CHECK(slots[kBin] >= 0 && slots[kBin] < kBins, "state was not made for this operation");
  return {k, values.numel(), values.mutable_data_ptr<float>(), positions.mutable_data_ptr<int64_t>(), slots};
}

cpu::GradType grad_type(const Tensor& grad) {
  switch (grad.scalar_type()) {
    case ScalarType::Float:
      return cpu::GradType::fp32;
    case ScalarType::BFloat16:
      return cpu::GradType::bf16;
    default:
      return cpu::GradType::fp16;
  }
}

void accumulate_topk_(const Tensor& acc, const std::optional<Tensor>& grad, double scale, bool square, int64_t key,
                      int64_t offset, int64_t k, const Tensor& values, const Tensor& positions, const Tensor& state) {
  check_cpu(acc, "acc");
  check_dtype(acc, ScalarType::Float, "acc");
  STD_TORCH_CHECK(acc.is_contiguous(), "acc must be contiguous");
  const int64_t n = acc.numel();
  STD_TORCH_CHECK(key >= 0 && key < kMaxKeys, "key must be in [0, ", kMaxKeys, "), but is ", key);
  STD_TORCH_CHECK(offset >= 0 && offset <= kMaxElements - n, "offset ", offset, " plus ", n,
                  " elements must stay within ", kMaxElements);
  const cpu::TopkBuffer buffer = check_buffer(k, values, positions, state);

  float* accumulator = acc.mutable_data_ptr<float>();
  cpu::Scan scan{accumulator, accumulator, cpu::GradType::none, static_cast<float>(scale), square, n};
  if (grad.has_value()) {
    check_cpu(*grad, "grad");
    check_trainable_dtype(grad->scalar_type(), "grad");
    STD_TORCH_CHECK(grad->is_contiguous(), "grad must be contiguous");
    STD_TORCH_CHECK(grad->numel() == n, "grad must have as many elements as acc (", n, "), not ", grad->numel());
    scan.grad = grad->const_data_ptr();
    scan.type = grad_type(*grad);
  }
  cpu::accumulate_topk(scan, (key << kPositionBits) + offset, buffer);
}

void compact_topk_(int64_t k, const Tensor& values, const Tensor& positions, const Tensor& state) {
  cpu::compact_topk(check_buffer(k, values, positions, state));
}

}  // namespace
}  // namespace saft

STABLE_TORCH_LIBRARY_IMPL(saft_kernels, CPU, m) {
  m.impl("accumulate_topk_", TORCH_BOX(&saft::accumulate_topk_));
  m.impl("compact_topk_", TORCH_BOX(&saft::compact_topk_));
}
