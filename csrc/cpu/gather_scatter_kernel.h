// The inner loops of gather and scatter_. See ops/gather_scatter.h for the operations.
#pragma once

#include <cstdint>

#include "isa.h"
#include "strided.h"

namespace saft::cpu {

struct GatherScatter {
  void* dense;
  void* values;      // [indices.n], contiguous
  int element_size;  // 1, 2, 4 or 8 bytes: values are moved as bits
  Strided layout;    // of dense
  Indices indices;
};

struct GatherScatterKernels {
  void (*gather)(const GatherScatter& job, int64_t begin, int64_t end);
  void (*scatter)(const GatherScatter& job, int64_t begin, int64_t end);
};

SAFT_DECLARE_KERNELS(GatherScatterKernels, gather_scatter)

}  // namespace saft::cpu
