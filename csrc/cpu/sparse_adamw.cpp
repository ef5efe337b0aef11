#include "../ops/sparse_adamw.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "index_values.h"
#include "parallel.h"
#include "sparse_adamw_kernel.h"

namespace saft::cpu {
namespace {

double scalar_value(const Tensor& tensor, const char* name) {
  check_scalar(tensor, name, kCpu);
  return tensor.scalar_type() == ScalarType::Float ? *tensor.const_data_ptr<float>() : *tensor.const_data_ptr<double>();
}

// f(tensor, begin, end) for all entries of all tensors, in parallel; entries count within the tensor.
template <typename F>
void parallel_for_tensors(const std::vector<int64_t>& bounds, const F& f) {
  parallel_for_entries(bounds.back(), [&](int64_t begin, int64_t end) {
    const auto next = std::upper_bound(bounds.begin(), bounds.end(), begin);
    for (auto i = static_cast<size_t>(next - bounds.begin() - 1); begin < end; ++i) {
      const int64_t stop = std::min(end, bounds[i + 1]);
      if (begin < stop) f(i, begin - bounds[i], stop - bounds[i]);
      begin = stop;
    }
  });
}

void require_indices(const AdamWStep& step) {
  std::atomic<const AdamWTensor*> wrong{nullptr};
  parallel_for_tensors(step.bounds, [&](size_t i, int64_t begin, int64_t end) {
    const Indices indices = step.vectors.indices.slice(step.bounds[i], step.bounds[i + 1]);
    if (!increase_below(indices, begin, end, step.tensors[i].numel))
      wrong.store(&step.tensors[i], std::memory_order_relaxed);
  });
  if (const AdamWTensor* tensor = wrong.load()) require_increase_below(false, tensor->numel, "indices");
}

// The tensors with their parts of the vectors; counts the step.
std::vector<AdamWSegment> segments_of(const AdamWStep& step, double rate, double beta1, double beta2) {
  std::vector<AdamWSegment> segments;
  segments.reserve(step.tensors.size());
  for (size_t i = 0; i < step.tensors.size(); ++i) {
    const float taken = step.step[i] += 1;
    const AdamWVectors vectors = step.vectors.slice(step.bounds[i], step.bounds[i + 1]);
    if (i > 0 && taken == step.step[i - 1])  // nearly always, and powers are slow
      segments.push_back({step.tensors[i], vectors, segments[i - 1].step_size, segments[i - 1].bias_correction2});
    else
      segments.push_back({step.tensors[i], vectors, static_cast<float>(rate / (1 - std::pow(beta1, taken))),
                          static_cast<float>(std::sqrt(1 - std::pow(beta2, taken)))});
  }
  return segments;
}

void sparse_adamw_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                   const std::optional<Tensor>& compact_grad, const Tensor& indices, const std::vector<int64_t>& bounds,
                   const Tensor& exp_avg, const Tensor& exp_avg_sq, const std::optional<Tensor>& master,
                   const Tensor& taken, double lr, const std::optional<Tensor>& lr_tensor, double beta1, double beta2,
                   double eps, double weight_decay, bool maximize, const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& found_inf) {
  const AdamWStep step =
      check_adamw_step(params, grads, compact_grad, indices, bounds, exp_avg, exp_avg_sq, master, taken, kCpu);
  require_indices(step);
  const double rate = lr_tensor.has_value() ? scalar_value(*lr_tensor, "lr") : lr;
  const double scale = grad_scale.has_value() ? scalar_value(*grad_scale, "grad_scale") : 1.0;
  if (found_inf.has_value() && scalar_value(*found_inf, "found_inf") != 0) return;

  const AdamW hyper{
      .type = step.type,
      .beta1 = 1 - static_cast<float>(1 - beta1),
      .one_minus_beta1 = static_cast<float>(1 - beta1),
      .beta2 = static_cast<float>(beta2),
      .one_minus_beta2 = static_cast<float>(1 - beta2),
      .eps = static_cast<float>(eps),
      .keep = static_cast<float>(1 - rate * weight_decay),
      .inverse_grad_scale = static_cast<float>(1 / scale),
      .sign = maximize ? -1.0f : 1.0f,
  };
  const std::vector<AdamWSegment> segments = segments_of(step, rate, beta1, beta2);
  const auto& kernels = sparse_adamw_kernels();
  parallel_for_tensors(bounds,
                       [&](size_t i, int64_t begin, int64_t end) { kernels.step(segments[i], hyper, begin, end); });
}

}  // namespace
}  // namespace saft::cpu

STABLE_TORCH_LIBRARY_IMPL(saft_kernels, CPU, m) {
  m.impl("sparse_adamw_", TORCH_BOX(&saft::cpu::sparse_adamw_));
}
