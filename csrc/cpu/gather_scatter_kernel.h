// The inner loops of gather and scatter_. See ops/gather_scatter.h for the operations.
#pragma once

#include <cstdint>

#include "../ops/jobs.h"
#include "isa.h"

namespace saft::cpu {

struct GatherScatterKernels {
  void (*gather)(const GatherScatter& job, int64_t begin, int64_t end);
  void (*scatter)(const GatherScatter& job, int64_t begin, int64_t end);
};

SAFT_DECLARE_KERNELS(GatherScatterKernels, gather_scatter)

}  // namespace saft::cpu
