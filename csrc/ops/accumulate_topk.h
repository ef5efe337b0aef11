// accumulate_topk: acc += scale * grad, and the k largest |acc| seen so far, in one pass over memory.
//
// accumulate_topk_(acc fp32 [n]!, grad [n]?, scale, square, key, offset, k, values fp32 [c]!, positions int64 [c]!,
//                  state int64 [kStateSize]!)
// compact_topk_(k, values!, positions!, state!)
//
// Contract
// - acc and grad are contiguous; grad is fp32, bf16 or fp16, or absent. acc must not overlap grad.
// - acc[i] + round(scale * grad[i]), rounded: no fused multiply-add, hence the same bits on every backend.
// - A candidate is a pair (value = |acc[i]|, position = key << 40 | offset + i). Candidates are ordered by larger
//   value, then lower position; positions are unique, so the order is total and so is the result: after
//   compact_topk_ the buffer holds exactly the k best of all candidates offered, for any order of calls and any
//   number of threads. Which losers the buffer holds in between is unspecified.
// - c > k. The threshold only rises: to the worst of the k best whenever a full buffer is compacted to these, and
//   between compactions to the lower edge of a histogram bin once k candidates are known to lie above that edge.
// - NaN and infinite entries are never candidates; state[NONFINITE] keeps the lowest position of one.
// - k = 0: accumulate and look for non-finite entries only; values and positions are not touched.
#pragma once

#include <cstdint>
#include <limits>

namespace saft {

// Mirrors saft_kernels/layout.py.
constexpr int kPositionBits = 40;
constexpr int64_t kMaxElements = int64_t{1} << kPositionBits;
constexpr int64_t kMaxKeys = int64_t{1} << (63 - kPositionBits);

// A value's bin in the histogram: the exponent and the 6 leading mantissa bits of a non-negative float, so that
// bins are ordered as values are and 1.6% wide.
constexpr int kBinShift = 17;
constexpr int kBins = 1 << (31 - kBinShift);

// kBin: the bin whose lower edge is the highest known bound; kAbove: candidates so far in it and above.
enum StateSlot : int {
  kCount,
  kThreshold,
  kTie,
  kNonFinite,
  kBin,
  kAbove,
  kHistogram,
  kStateSize = kHistogram + kBins
};

constexpr int64_t kNoThreshold = -1;
constexpr int64_t kNoPosition = std::numeric_limits<int64_t>::max();

}  // namespace saft
