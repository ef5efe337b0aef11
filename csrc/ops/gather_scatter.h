// gather and scatter_: dense tensor <-> compact values at sorted flat indices.
//
// gather(dense, indices [n]) -> [n]
// scatter_(dense!, indices [n], values [n])
//
// Contract
// - dense: any floating type of 1, 2, 4 or 8 bytes, any strides; flat indices count in logical row-major order, so a
//   channels_last weight and its contiguous copy share their indices. scatter_ refuses overlapping elements.
// - indices: int32 or int64, strictly increasing, in range; checked before anything is read or written (on a GPU by
//   the caller: saft_kernels/index_values.py).
// - values: contiguous, the dtype of dense. Bits are moved, never converted. Those of scatter_ must not share memory
//   with dense; it refuses them where it can tell, that is if dense has no gaps in memory.
// - Every entry of dense that is not indexed keeps its bits. Deterministic for any number of threads.
#pragma once

#include "checks.h"
#include "jobs.h"

namespace saft {

// The values of the indices are not checked yet.
GatherScatter check_gather(const Tensor& dense, const Tensor& indices, const Tensor& values, Device device);
GatherScatter check_scatter(const Tensor& dense, const Tensor& indices, const Tensor& values, Device device);

}  // namespace saft
