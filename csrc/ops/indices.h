// Views of index and dense tensors that kernels take, made only from what has been checked.
#pragma once

#include "../cpu/strided.h"
#include "checks.h"

namespace saft {

// The layout of a dense tensor. `writable`: its elements must not overlap in memory.
cpu::Strided strided_of(const Tensor& dense, bool writable, const char* name);

// Checks that `indices` is a vector of int32 or int64 that increases strictly within [0, numel).
cpu::Indices indices_of(const Tensor& indices, int64_t numel, const char* name);

}  // namespace saft
