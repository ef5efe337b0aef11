// The inner loops of pack_columns and sampled_grad. See ops/sampled_grad.h for the operations.
#pragma once

#include <cstdint>

#include "../ops/jobs.h"
#include "isa.h"

namespace saft::cpu {

struct SampledGradKernels {
  // Packs token blocks [begin, end).
  void (*pack)(const PackColumns& job, int64_t begin, int64_t end);
  // The gradient of the entries in rows [begin, end); sums: kTokens numbers of the type of grad for each of them.
  void (*grad)(const SampledGrad& job, int64_t begin, int64_t end, void* sums);
};

SAFT_DECLARE_KERNELS(SampledGradKernels, sampled_grad)

}  // namespace saft::cpu
