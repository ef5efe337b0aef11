// Views of index and dense tensors that kernels take, made only from what has been checked.
#pragma once

#include "../cpu/strided.h"
#include "checks.h"

namespace saft {

// The layout of a dense tensor. `writable`: its elements must not overlap in memory.
cpu::Strided strided_of(const Tensor& dense, bool writable, const char* name);

// A contiguous vector of int32 or int64, whose values are not looked at.
cpu::Indices index_vector(const Tensor& indices, const char* name);

// Whether entries [begin, end) of `indices` lie within [0, numel), and each is greater than the one before it; that of
// `begin` too, unless it is the first of all.
bool increase_below(const cpu::Indices& indices, int64_t begin, int64_t end, int64_t numel);

void require_increase_below(bool holds, int64_t numel, const char* name);

// Checks that `indices` is a vector of int32 or int64 that increases strictly within [0, numel).
cpu::Indices indices_of(const Tensor& indices, int64_t numel, const char* name);

}  // namespace saft
