// Candidates of accumulate_topk on a GPU: the bar that they must pass, and how warps put them into the buffer.
#pragma once

#include <cstdint>

#include "../ops/jobs.h"
#include "vectors.cuh"

namespace saft::cuda {

constexpr unsigned kWarp = 0xffffffff;  // all lanes
constexpr int32_t kInfinity = 0x7f800000;

// Non-negative floats order as their bits do.
__device__ inline int32_t magnitude_bits(float x) {
  return __float_as_int(x) & 0x7fffffff;
}

// The k-th best candidate so far, or a bound below it.
struct Bar {
  int32_t bits;  // kNoThreshold lies below all
  int64_t tie;

  // Whether a candidate that is offered now may be among the k best.
  __device__ bool admits(int32_t candidate, int64_t position) const {
    return candidate > bits || (candidate == bits && position < tie);
  }

  // Whether one that has been offered may be: the k-th best itself lies at the tie.
  __device__ bool keeps(int32_t candidate, int64_t position) const {
    return candidate > bits || (candidate == bits && position <= tie);
  }
};

__device__ inline Bar bar_of(const int64_t* state) {
  return {static_cast<int32_t>(state[kThreshold]), state[kTie]};
}

// 64-bit atomics are declared for unsigned numbers; sums are the same.
__device__ inline int64_t add(int64_t* counter, int64_t n) {
  return static_cast<int64_t>(
      atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(n)));
}

__device__ inline unsigned lanes_below() {
  return (1u << (threadIdx.x % 32)) - 1;
}

// add(index, how many lanes have it) for every index of an active lane, once for each: neighbours often have the same
// one. To be called by whole warps.
template <typename Add>
__device__ void count_each(int index, bool active, Add add) {
  const unsigned lanes = __ballot_sync(kWarp, active);
  if (!active) return;
  const unsigned peers = __match_any_sync(lanes, index);
  if ((peers & lanes_below()) == 0) add(index, __popc(peers));
}

// A thread's consecutive elements of a tensor, of which those whose bit is set in `chosen` are candidates.
struct Found {
  int32_t bits[kEntries];
  int64_t position;  // of the first
  unsigned chosen;

  __device__ bool has(int i) const { return chosen >> i & 1; }
};

// Appends the candidates of a warp behind `begin` others, with one atomic on `counter`, which counts them whether or
// not there is room. To be called by whole warps.
__device__ inline void append(const TopkBuffer& buffer, int64_t begin, int64_t* counter, const Found& found) {
  int total = 0;
  int rank[kEntries];
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    const unsigned lanes = __ballot_sync(kWarp, found.has(i));
    rank[i] = total + __popc(lanes & lanes_below());
    total += __popc(lanes);
  }
  if (total == 0) return;
  int64_t first = 0;
  if (threadIdx.x % 32 == 0) first = add(counter, total);
  first = begin + __shfl_sync(kWarp, first, 0);
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    const int64_t slot = first + rank[i];
    if (!found.has(i) || slot >= buffer.capacity) continue;
    buffer.values[slot] = __int_as_float(found.bits[i]);
    buffer.positions[slot] = found.position + i;
  }
}

}  // namespace saft::cuda
