#include "sparse_adamw.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "../cpu/sparse_adamw_kernel.h"
#include "indices.h"
#include "parallel.h"

namespace saft {
namespace {

cpu::ParamType param_type(const Tensor& param) {
  check_trainable_dtype(param.scalar_type(), "params");
  switch (param.scalar_type()) {
    case ScalarType::Float:
      return cpu::ParamType::fp32;
    case ScalarType::BFloat16:
      return cpu::ParamType::bf16;
    default:
      return cpu::ParamType::fp16;
  }
}

double scalar_value(const Tensor& tensor, const char* name) {
  check_cpu(tensor, name);
  STD_TORCH_CHECK(tensor.numel() == 1, name, " must have one element, not ", tensor.numel());
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return *tensor.const_data_ptr<float>();
    case ScalarType::Double:
      return *tensor.const_data_ptr<double>();
    default:
      STD_TORCH_CHECK(false, name, " must be float32 or float64, not ", name_of(tensor.scalar_type()));
  }
}

void check_grad(const Tensor& grad, const Tensor& param) {
  check_dtype(grad, param.scalar_type(), "every gradient");
  STD_TORCH_CHECK(grad.dim() == param.dim(), "a gradient must have the shape of its parameter");
  for (int64_t d = 0; d < grad.dim(); ++d)
    STD_TORCH_CHECK(grad.size(d) == param.size(d), "a gradient must have the shape of its parameter");
}

// The segment of tensor i without its place in the compact vectors.
cpu::AdamWSegment segment_of(const Tensor& param, const Tensor* grad, const Tensor& indices) {
  cpu::AdamWSegment segment{};
  segment.type = param_type(param);
  segment.param_layout = strided_of(param, true, "params");
  segment.param = param.mutable_data_ptr();
  segment.indices = indices_of(indices, param.numel(), "indices");
  if (grad) {
    check_grad(*grad, param);
    segment.grad_layout = strided_of(*grad, false, "grads");
    segment.grad = grad->const_data_ptr();
  }
  return segment;
}

struct Step {
  std::vector<cpu::AdamWSegment> segments;
  std::vector<int64_t> begins;  // of each segment in the compact vectors, and the total
};

Step check_tensors(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                   const std::optional<Tensor>& compact_grad, const std::vector<Tensor>& indices) {
  const size_t count = params.size();
  STD_TORCH_CHECK(indices.size() == count, "there must be one index vector per parameter: ", count, ", not ",
                  indices.size());
  STD_TORCH_CHECK(grads.size() == (compact_grad.has_value() ? 0 : count),
                  "gradients must be either one dense tensor per parameter (", count, ") or one compact vector, not ",
                  grads.size(), " dense tensors", compact_grad.has_value() ? " and a compact vector" : "");
  Step step;
  step.segments.reserve(count);
  step.begins.assign(1, 0);
  for (size_t i = 0; i < count; ++i) {
    check_dtype(params[i], params[0].scalar_type(), "every parameter of a call");
    step.segments.push_back(segment_of(params[i], grads.empty() ? nullptr : &grads[i], indices[i]));
    step.begins.push_back(step.begins.back() + step.segments.back().indices.n);
  }
  return step;
}

float* data_of(const std::optional<Tensor>& vector) {
  return vector.has_value() ? vector->mutable_data_ptr<float>() : nullptr;
}

void place(Step& step, const std::optional<Tensor>& compact_grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
           const std::optional<Tensor>& master) {
  const int64_t n = step.begins.back();
  check_vector(exp_avg, ScalarType::Float, n, "exp_avg");
  check_vector(exp_avg_sq, ScalarType::Float, n, "exp_avg_sq");
  if (compact_grad.has_value()) check_vector(*compact_grad, ScalarType::Float, n, "the compact gradient");
  const bool fp32 = step.segments.empty() || step.segments[0].type == cpu::ParamType::fp32;
  STD_TORCH_CHECK(
      step.segments.empty() || fp32 != master.has_value(),
      fp32 ? "float32 parameters take no master values" : "bfloat16 and float16 parameters need master values");
  if (master.has_value()) check_vector(*master, ScalarType::Float, n, "master");

  float* grad = data_of(compact_grad);
  float* weights = data_of(master);
  float* m = exp_avg.mutable_data_ptr<float>();
  float* v = exp_avg_sq.mutable_data_ptr<float>();
  for (size_t i = 0; i < step.segments.size(); ++i) {
    cpu::AdamWSegment& segment = step.segments[i];
    const int64_t begin = step.begins[i];
    segment.compact_grad = grad ? grad + begin : nullptr;
    segment.master = weights ? weights + begin : nullptr;
    segment.exp_avg = m + begin;
    segment.exp_avg_sq = v + begin;
  }
}

void run(const Step& step, const cpu::AdamW& hyper) {
  parallel_for_entries(step.begins.back(), [&](int64_t begin, int64_t end) {
    const auto& kernels = cpu::sparse_adamw_kernels();
    auto i =
        static_cast<size_t>(std::upper_bound(step.begins.begin(), step.begins.end(), begin) - step.begins.begin() - 1);
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, step.begins[i + 1]);
      kernels.step(step.segments[i], hyper, begin - step.begins[i], stop - step.begins[i]);
      begin = stop;
    }
  });
}

void sparse_adamw_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                   const std::optional<Tensor>& compact_grad, const std::vector<Tensor>& indices, const Tensor& exp_avg,
                   const Tensor& exp_avg_sq, const std::optional<Tensor>& master, const Tensor& steps, double lr,
                   const std::optional<Tensor>& lr_tensor, double beta1, double beta2, double eps, double weight_decay,
                   bool maximize, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  Step step = check_tensors(params, grads, compact_grad, indices);
  place(step, compact_grad, exp_avg, exp_avg_sq, master);
  check_vector(steps, ScalarType::Float, "step");
  STD_TORCH_CHECK(steps.numel() == static_cast<int64_t>(params.size()), "step must have one element per parameter (",
                  params.size(), "), not ", steps.numel());
  const double rate = lr_tensor.has_value() ? scalar_value(*lr_tensor, "lr") : lr;
  const double scale = grad_scale.has_value() ? scalar_value(*grad_scale, "grad_scale") : 1.0;
  if (found_inf.has_value() && scalar_value(*found_inf, "found_inf") != 0) return;

  float* taken = steps.mutable_data_ptr<float>();
  for (size_t i = 0; i < params.size(); ++i) {
    taken[i] += 1;
    step.segments[i].step_size = static_cast<float>(rate / (1 - std::pow(beta1, taken[i])));
    step.segments[i].bias_correction2 = static_cast<float>(std::sqrt(1 - std::pow(beta2, taken[i])));
  }
  run(step, {
                .beta1 = 1 - static_cast<float>(1 - beta1),
                .one_minus_beta1 = static_cast<float>(1 - beta1),
                .beta2 = static_cast<float>(beta2),
                .one_minus_beta2 = static_cast<float>(1 - beta2),
                .eps = static_cast<float>(eps),
                .keep = static_cast<float>(1 - rate * weight_decay),
                .inverse_grad_scale = static_cast<float>(1 / scale),
                .sign = maximize ? -1.0f : 1.0f,
            });
}

}  // namespace
}  // namespace saft

STABLE_TORCH_LIBRARY_IMPL(saft_kernels, CPU, m) {
  m.impl("sparse_adamw_", TORCH_BOX(&saft::sparse_adamw_));
}
