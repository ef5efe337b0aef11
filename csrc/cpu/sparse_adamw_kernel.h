// The inner loop of sparse_adamw_. See ops/sparse_adamw.h for the operation.
#pragma once

#include <cstdint>

#include "../ops/jobs.h"
#include "isa.h"

namespace saft::cpu {

// Factors that all tensors of a step share, rounded to fp32 as torch rounds its scalars.
struct AdamW {
  FloatType type;  // of the weights and of dense gradients
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
  float keep;                // 1 - lr * weight_decay
  float inverse_grad_scale;  // 1 without a scaler
  float sign;                // -1 to maximize
};

// One tensor's selected entries.
struct AdamWSegment {
  AdamWTensor tensor;
  AdamWVectors entries;    // the tensor's own
  float step_size;         // lr / (1 - beta1^t)
  float bias_correction2;  // sqrt(1 - beta2^t)
};

struct SparseAdamWKernels {
  // One AdamW step for entries [begin, end) of the segment.
  void (*step)(const AdamWSegment& segment, const AdamW& hyper, int64_t begin, int64_t end);
};

SAFT_DECLARE_KERNELS(SparseAdamWKernels, sparse_adamw)

}  // namespace saft::cpu
