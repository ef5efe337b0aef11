#include "accumulate_topk.h"

namespace saft {

TopkBuffer check_topk_buffer(int64_t k, const Tensor& values, const Tensor& positions, const Tensor& state,
                             Device device) {
  check_vector(values, device, ScalarType::Float, "values");
  check_vector(positions, device, ScalarType::Long, "positions");
  check_vector(state, device, ScalarType::Long, "state");
  STD_TORCH_CHECK(state.numel() == kStateSize, "state must have ", int{kStateSize}, " elements, not ", state.numel());
  STD_TORCH_CHECK(values.numel() == positions.numel(), "values and positions must have the same length, not ",
                  values.numel(), " and ", positions.numel());
  STD_TORCH_CHECK(k >= 0, "k must not be negative, but is ", k);
  STD_TORCH_CHECK(k == 0 || values.numel() > k, "the buffer must hold more than k = ", k, " candidates, not ",
                  values.numel());
  return {k, values.numel(), values.mutable_data_ptr<float>(), positions.mutable_data_ptr<int64_t>(),
          state.mutable_data_ptr<int64_t>()};
}

Scan check_scan(const Tensor& acc, const std::optional<Tensor>& grad, double scale, bool square, int64_t key,
                int64_t offset, Device device) {
  check_device(acc, device, "acc");
  check_dtype(acc, ScalarType::Float, "acc");
  STD_TORCH_CHECK(acc.is_contiguous(), "acc must be contiguous");
  const int64_t n = acc.numel();
  STD_TORCH_CHECK(key >= 0 && key < kMaxKeys, "key must be in [0, ", kMaxKeys, "), but is ", key);
  STD_TORCH_CHECK(offset >= 0 && offset <= kMaxElements - n, "offset ", offset, " plus ", n,
                  " elements must stay within ", kMaxElements);
  Scan scan{acc.mutable_data_ptr<float>(),  nullptr, FloatType::none, static_cast<float>(scale), square, n,
            (key << kPositionBits) + offset};
  if (grad.has_value()) {
    check_device(*grad, device, "grad");
    scan.type = trainable_type(*grad, "grad");
    STD_TORCH_CHECK(grad->is_contiguous(), "grad must be contiguous");
    STD_TORCH_CHECK(grad->numel() == n, "grad must have as many elements as acc (", n, "), not ", grad->numel());
    scan.grad = grad->const_data_ptr();
  }
  return scan;
}

}  // namespace saft
