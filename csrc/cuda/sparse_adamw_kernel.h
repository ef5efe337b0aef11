// Launcher of sparse_adamw_. See ops/sparse_adamw.h for the operation.
#pragma once

#include <cuda_runtime_api.h>

#include "../ops/jobs.h"

namespace saft::cuda {

// A number that the host knows, or one in the GPU's memory, read when the step runs.
struct Scalar {
  double value;
  const void* data;  // null: value
  bool is_double;    // data, else fp32
};

// Factors that all tensors of a step share, those that the host knows rounded to fp32 as torch rounds its scalars.
struct AdamW {
  FloatType type;  // of the weights and of dense gradients
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float log_beta1;  // finite, also for beta = 0
  float log_beta2;
  float eps;
  float sign;  // -1 to maximize
  double weight_decay;
  Scalar lr;
  Scalar grad_scale;
  Scalar found_inf;
};

// Tensor i of `count` owns entries [bounds[i], bounds[i + 1]) of the vectors.
struct AdamWJob {
  const AdamWTensor* tensors;
  const int64_t* bounds;
  int64_t count;
  AdamWVectors vectors;
  float* step;  // [count]
};

cudaError_t launch_sparse_adamw(const AdamWJob& job, const AdamW& hyper, cudaStream_t stream);

}  // namespace saft::cuda
