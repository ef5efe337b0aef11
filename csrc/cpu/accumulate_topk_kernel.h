// The vectorised inner loop of accumulate_topk_. See ops/accumulate_topk.h for the operation.
#pragma once

#include <cstdint>

#include "../ops/jobs.h"
#include "isa.h"

namespace saft::cpu {

struct AccumulateTopkKernels {
  // For i in [begin, end):  acc[i] += scale * grad[i];  unless |acc[i]| < threshold, append i - begin to `survivors`.
  // NaN and infinity always survive. Returns the number of survivors; `survivors` has room for end - begin.
  int64_t (*scan)(const Scan& scan, int64_t begin, int64_t end, float threshold, int32_t* survivors);
  // Keeps the candidates with bits of value > bits, or equal bits and position <= tie. Returns how many.
  int64_t (*keep)(float* values, int64_t* positions, int64_t n, uint32_t bits, int64_t tie);
};

SAFT_DECLARE_KERNELS(AccumulateTopkKernels, accumulate_topk)

}  // namespace saft::cpu
