#include "sparse_adamw.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
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

// The segment of a tensor without its place in the compact vectors.
cpu::AdamWSegment segment_of(const Tensor& param, const Tensor* grad) {
  cpu::AdamWSegment segment{};
  segment.type = param_type(param);
  segment.param_layout = strided_of(param, true, "params");
  segment.param = param.mutable_data_ptr();
  segment.numel = param.numel();
  if (grad) {
    check_grad(*grad, param);
    segment.grad_layout = strided_of(*grad, false, "grads");
    segment.grad = grad->const_data_ptr();
  }
  return segment;
}

struct Step {
  std::vector<cpu::AdamWSegment> segments;
  std::vector<int64_t> bounds;  // of each segment in the compact vectors

  int64_t entries() const { return bounds.back(); }
};

void check_bounds(const std::vector<int64_t>& bounds, size_t count, int64_t n) {
  STD_TORCH_CHECK(bounds.size() == count + 1, "there must be one index vector per parameter: ", count, ", not ",
                  static_cast<int64_t>(bounds.size()) - 1);
  STD_TORCH_CHECK(bounds.front() == 0 && bounds.back() == n && std::is_sorted(bounds.begin(), bounds.end()),
                  "bounds must rise from 0 to the number of indices, ", n);
}

Step check_tensors(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                   const std::optional<Tensor>& compact_grad, const std::vector<int64_t>& bounds) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == (compact_grad.has_value() ? 0 : count),
                  "gradients must be either one dense tensor per parameter (", count, ") or one compact vector, not ",
                  grads.size(), " dense tensors", compact_grad.has_value() ? " and a compact vector" : "");
  Step step{{}, bounds};
  step.segments.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    check_dtype(params[i], params[0].scalar_type(), "every parameter of a call");
    step.segments.push_back(segment_of(params[i], grads.empty() ? nullptr : &grads[i]));
  }
  return step;
}

float* data_of(const std::optional<Tensor>& vector) {
  return vector.has_value() ? vector->mutable_data_ptr<float>() : nullptr;
}

void place(Step& step, const std::optional<Tensor>& compact_grad, const cpu::Indices& indices, const Tensor& exp_avg,
           const Tensor& exp_avg_sq, const std::optional<Tensor>& master) {
  const int64_t n = step.entries();
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
    const int64_t begin = step.bounds[i];
    segment.indices = indices.slice(begin, step.bounds[i + 1]);
    segment.compact_grad = grad ? grad + begin : nullptr;
    segment.master = weights ? weights + begin : nullptr;
    segment.exp_avg = m + begin;
    segment.exp_avg_sq = v + begin;
  }
}

// f(segment, begin, end) for all entries of all segments, in parallel.
template <typename F>
void parallel_for_segments(const Step& step, const F& f) {
  parallel_for_entries(step.entries(), [&](int64_t begin, int64_t end) {
    const auto next = std::upper_bound(step.bounds.begin(), step.bounds.end(), begin);
    for (auto i = static_cast<size_t>(next - step.bounds.begin() - 1); begin < end; ++i) {
      const int64_t stop = std::min(end, step.bounds[i + 1]);
      if (begin < stop) f(step.segments[i], begin - step.bounds[i], stop - step.bounds[i]);
      begin = stop;
    }
  });
}

void check_indices(const Step& step) {
  std::atomic<const cpu::AdamWSegment*> wrong{nullptr};
  parallel_for_segments(step, [&](const cpu::AdamWSegment& segment, int64_t begin, int64_t end) {
    if (!increase_below(segment.indices, begin, end, segment.numel)) wrong.store(&segment, std::memory_order_relaxed);
  });
  if (const cpu::AdamWSegment* segment = wrong.load()) require_increase_below(false, segment->numel, "indices");
}

void run(const Step& step, const cpu::AdamW& hyper) {
  const auto& kernels = cpu::sparse_adamw_kernels();
  parallel_for_segments(step, [&](const cpu::AdamWSegment& segment, int64_t begin, int64_t end) {
    kernels.step(segment, hyper, begin, end);
  });
}

void sparse_adamw_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                   const std::optional<Tensor>& compact_grad, const Tensor& indices, const std::vector<int64_t>& bounds,
                   const Tensor& exp_avg, const Tensor& exp_avg_sq, const std::optional<Tensor>& master,
                   const Tensor& steps, double lr, const std::optional<Tensor>& lr_tensor, double beta1, double beta2,
                   double eps, double weight_decay, bool maximize, const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& found_inf) {
  const cpu::Indices flat = index_vector(indices, "indices");
  check_bounds(bounds, params.size(), flat.n);
  Step step = check_tensors(params, grads, compact_grad, bounds);
  place(step, compact_grad, flat, exp_avg, exp_avg_sq, master);
  check_indices(step);
  check_vector(steps, ScalarType::Float, "step");
  STD_TORCH_CHECK(steps.numel() == static_cast<int64_t>(params.size()), "step must have one element per parameter (",
                  params.size(), "), not ", steps.numel());
  const double rate = lr_tensor.has_value() ? scalar_value(*lr_tensor, "lr") : lr;
  const double scale = grad_scale.has_value() ? scalar_value(*grad_scale, "grad_scale") : 1.0;
  if (found_inf.has_value() && scalar_value(*found_inf, "found_inf") != 0) return;

  float* taken = steps.mutable_data_ptr<float>();
  for (size_t i = 0; i < params.size(); ++i) {
    taken[i] += 1;
    const bool as_before = i > 0 && taken[i] == taken[i - 1];  // nearly always, and powers are slow
    step.segments[i].step_size =
        as_before ? step.segments[i - 1].step_size : static_cast<float>(rate / (1 - std::pow(beta1, taken[i])));
    step.segments[i].bias_correction2 = as_before ? step.segments[i - 1].bias_correction2
                                                  : static_cast<float>(std::sqrt(1 - std::pow(beta2, taken[i])));
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
