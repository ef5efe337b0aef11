// sparse_adamw_: one AdamW step over the selected entries of many tensors, in one call.
//
// sparse_adamw_(params [T]!, grads [T] or [], compact_grad fp32 [n]?, indices [n], bounds [T + 1], exp_avg fp32 [n]!,
//               exp_avg_sq fp32 [n]!, master fp32 [n]?!, step fp32 [T]!, lr, lr_tensor [1]?, beta1, beta2, eps,
//               weight_decay, maximize, grad_scale fp32 [1]?, found_inf fp32 [1]?)
//
// Contract
// - indices and the compact vectors hold the tensors' entries one after the other; those of tensor i are
//   [bounds[i], bounds[i + 1]). One vector, since a cold tensor handle costs a microsecond of cache misses.
// - Exactly one gradient source: T dense tensors of the params' dtype and shape, any strides; or compact_grad.
// - params: one dtype. bf16 and fp16 need master, which holds the exact weights: the step updates master and the
//   weight becomes its rounding. fp32 takes none.
// - lr_tensor, if given, takes the place of lr. It, grad_scale and found_inf are read when the step runs, where they
//   are on the device of the other arguments, and at the call, where they are on the CPU.
// - step is incremented first; t = step[i] for tensor i. found_inf != 0: nothing is changed.
// - Gradients are divided by grad_scale (multiplied by its fp32 reciprocal, as torch's fused AdamW does).
// - Everything is checked before anything is written. Entries outside the indices keep their bits.
// - Deterministic for any number of threads, and the same bits on every CPU instruction set.
#pragma once

#include <optional>
#include <vector>

#include "checks.h"
#include "jobs.h"

namespace saft {

// Tensor i owns entries [bounds[i], bounds[i + 1]) of the vectors. The values of the indices are not checked yet.
struct AdamWStep {
  const std::vector<int64_t>& bounds;
  FloatType type = FloatType::fp32;  // of all params and dense gradients
  std::vector<AdamWTensor> tensors{};
  AdamWVectors vectors{};
  float* step = nullptr;  // [tensors.size()]
};

AdamWStep check_adamw_step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                           const std::optional<Tensor>& compact_grad, const Tensor& indices,
                           const std::vector<int64_t>& bounds, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                           const std::optional<Tensor>& master, const Tensor& step, Device device);

// A tensor of one fp32 or fp64 number, on the device of the other arguments or on the CPU.
void check_scalar(const Tensor& tensor, const char* name, Device device);

}  // namespace saft
