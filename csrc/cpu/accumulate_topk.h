// Multi-threaded streaming selection on the CPU: splits the tensor over threads and owns the shared buffer.
#pragma once

#include <cstdint>

#include "accumulate_topk_kernel.h"

namespace saft::cpu {

// The caller's buffer tensors; see ops/accumulate_topk.h.
struct TopkBuffer {
  int64_t k;
  int64_t capacity;
  float* values;
  int64_t* positions;
  int64_t* state;
};

// `base` is the position of scan.acc[0].
void accumulate_topk(const Scan& scan, int64_t base, const TopkBuffer& buffer);
void compact_topk(const TopkBuffer& buffer);

}  // namespace saft::cpu
