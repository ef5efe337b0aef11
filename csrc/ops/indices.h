// Views of index and dense tensors that kernels take, made only from what has been checked.
#pragma once

#include "checks.h"
#include "jobs.h"

namespace saft {

// The layout of a dense tensor. `writable`: its elements must not overlap in memory.
Strided strided_of(const Tensor& dense, bool writable, const char* name);

// A contiguous vector of int32 or int64, whose values are not looked at: that is the backend's business, since on a GPU
// it takes a synchronisation (cpu/index_values.h; saft_kernels/index_values.py for GPUs).
Indices index_vector(const Tensor& indices, Device device, const char* name);

// The same for int32 alone.
const int32_t* int32_vector(const Tensor& indices, Device device, const char* name);

}  // namespace saft
