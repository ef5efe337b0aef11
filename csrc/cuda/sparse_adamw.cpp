#include "../ops/sparse_adamw.h"

#include <algorithm>
#include <cmath>

#include "device.h"
#include "sparse_adamw_kernel.h"

namespace saft::cuda {
namespace {

double value_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float ? *tensor.const_data_ptr<float>() : *tensor.const_data_ptr<double>();
}

// A tensor on the GPU is read there when the step runs: reading it here would wait for the GPU.
Scalar scalar_of(const std::optional<Tensor>& tensor, double otherwise, const char* name, Device device) {
  if (!tensor.has_value()) return {otherwise, nullptr, false};
  check_scalar(*tensor, name, device);
  if (device.holds(*tensor)) return {0, tensor->const_data_ptr(), tensor->scalar_type() == ScalarType::Double};
  return {value_of(*tensor), nullptr, false};
}

float log_of(double beta) {
  constexpr double kLogOfZero = -1000;  // e to that power is zero in fp32
  return static_cast<float>(std::max(std::log(beta), kLogOfZero));
}

void sparse_adamw_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                   const std::optional<Tensor>& compact_grad, const Tensor& indices, const std::vector<int64_t>& bounds,
                   const Tensor& exp_avg, const Tensor& exp_avg_sq, const std::optional<Tensor>& master,
                   const Tensor& taken, double lr, const std::optional<Tensor>& lr_tensor, double beta1, double beta2,
                   double eps, double weight_decay, bool maximize, const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& found_inf) {
  const Call call(exp_avg, "exp_avg");
  const Device device = call.device();
  const AdamWStep step =
      check_adamw_step(params, grads, compact_grad, indices, bounds, exp_avg, exp_avg_sq, master, taken, device);
  const AdamW hyper{
      .type = step.type,
      .beta1 = 1 - static_cast<float>(1 - beta1),
      .one_minus_beta1 = static_cast<float>(1 - beta1),
      .beta2 = static_cast<float>(beta2),
      .one_minus_beta2 = static_cast<float>(1 - beta2),
      .log_beta1 = log_of(beta1),
      .log_beta2 = log_of(beta2),
      .eps = static_cast<float>(eps),
      .sign = maximize ? -1.0f : 1.0f,
      .weight_decay = weight_decay,
      .lr = scalar_of(lr_tensor, lr, "lr", device),
      .grad_scale = scalar_of(grad_scale, 1, "grad_scale", device),
      .found_inf = scalar_of(found_inf, 0, "found_inf", device),
  };
  const auto count = static_cast<int64_t>(step.tensors.size());
  check(launch_sparse_adamw({step.tensors.data(), step.bounds.data(), count, step.vectors, step.step}, hyper,
                            call.stream()));
}

}  // namespace
}  // namespace saft::cuda

STABLE_TORCH_LIBRARY_IMPL(SAFT_GPU_LIBRARY, SAFT_GPU_KEY, m) {
  m.impl("sparse_adamw_", TORCH_BOX(&saft::cuda::sparse_adamw_));
}
