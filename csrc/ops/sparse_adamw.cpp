#include "sparse_adamw.h"

#include <algorithm>

#include "indices.h"

namespace saft {
namespace {

void check_grad(const Tensor& grad, const Tensor& param, Device device) {
  check_device(grad, device, "every gradient");
  check_dtype(grad, param.scalar_type(), "every gradient");
  STD_TORCH_CHECK(grad.dim() == param.dim(), "a gradient must have the shape of its parameter");
  for (int64_t d = 0; d < grad.dim(); ++d)
    STD_TORCH_CHECK(grad.size(d) == param.size(d), "a gradient must have the shape of its parameter");
}

AdamWTensor check_tensor(const Tensor& param, const Tensor* grad, Device device) {
  check_device(param, device, "every parameter");
  AdamWTensor tensor{param.mutable_data_ptr(), nullptr, param.numel(), strided_of(param, true, "params"), {}};
  if (grad) {
    check_grad(*grad, param, device);
    tensor.grad = grad->const_data_ptr();
    tensor.grad_layout = strided_of(*grad, false, "grads");
  }
  return tensor;
}

void check_bounds(const std::vector<int64_t>& bounds, size_t count, int64_t n) {
  STD_TORCH_CHECK(!bounds.empty(), "bounds must not be empty: they begin with 0");
  STD_TORCH_CHECK(bounds.size() == count + 1, "there must be one index vector per parameter: ", count, ", not ",
                  static_cast<int64_t>(bounds.size()) - 1);
  STD_TORCH_CHECK(bounds.front() == 0 && bounds.back() == n && std::is_sorted(bounds.begin(), bounds.end()),
                  "bounds must rise from 0 to the number of indices, ", n);
}

float* check_entries(const Tensor& vector, Device device, int64_t n, const char* name) {
  check_vector(vector, device, ScalarType::Float, n, name);
  return vector.mutable_data_ptr<float>();
}

}  // namespace

AdamWStep check_adamw_step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                           const std::optional<Tensor>& compact_grad, const Tensor& indices,
                           const std::vector<int64_t>& bounds, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                           const std::optional<Tensor>& master, const Tensor& step, Device device) {
  const size_t count = params.size();
  AdamWStep checked{bounds};
  AdamWVectors& vectors = checked.vectors;
  vectors.indices = index_vector(indices, device, "indices");
  const int64_t n = vectors.indices.n;
  check_bounds(bounds, count, n);
  STD_TORCH_CHECK(grads.size() == (compact_grad.has_value() ? 0 : count),
                  "gradients must be either one dense tensor per parameter (", count, ") or one compact vector, not ",
                  grads.size(), " dense tensors", compact_grad.has_value() ? " and a compact vector" : "");
  if (count > 0) checked.type = trainable_type(params[0], "params");
  checked.tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    check_dtype(params[i], params[0].scalar_type(), "every parameter of a call");
    checked.tensors.push_back(check_tensor(params[i], grads.empty() ? nullptr : &grads[i], device));
  }
  const bool fp32 = checked.type == FloatType::fp32;
  STD_TORCH_CHECK(count == 0 || fp32 != master.has_value(), fp32
                                                                ? "float32 parameters take no master values"
                                                                : "bfloat16 and float16 parameters need master values");
  vectors.exp_avg = check_entries(exp_avg, device, n, "exp_avg");
  vectors.exp_avg_sq = check_entries(exp_avg_sq, device, n, "exp_avg_sq");
  if (compact_grad.has_value()) vectors.grad = check_entries(*compact_grad, device, n, "the compact gradient");
  if (master.has_value()) vectors.master = check_entries(*master, device, n, "master");
  check_vector(step, device, ScalarType::Float, "step");
  STD_TORCH_CHECK(step.numel() == static_cast<int64_t>(count), "step must have one element per parameter (", count,
                  "), not ", step.numel());
  checked.step = step.mutable_data_ptr<float>();
  return checked;
}

void check_scalar(const Tensor& tensor, const char* name, Device device) {
  if (!kCpu.holds(tensor)) check_device(tensor, device, name);
  STD_TORCH_CHECK(tensor.numel() == 1, name, " must have one element, not ", tensor.numel());
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name, " must be float32 or float64, not ",
                  name_of(type));
}

}  // namespace saft
