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
//   number of threads. Which losers the buffer holds in between is unspecified. Where an entry is offered again, its
//   copies may stay beyond the k best; if there is no room for them, that is an error on the CPU, and on a GPU some
//   candidates are lost.
// - c > k. The threshold only rises, and never above the worst of the k best so far: it reaches that whenever a full
//   buffer is compacted to these (or stops short of it where no candidate lies between), and rises to the lower edge of
//   a histogram bin once k candidates are known to lie above that edge. An equal value counts at a position below the
//   tie only; what the buffer holds already stays up to the tie itself, where the worst of the k best may lie.
// - The histogram counts every candidate that beat the threshold when it was offered, once, whether or not the buffer
//   holds it; ABOVE counts those in BIN and above. All backends keep it, so that they may take turns on one buffer, and
//   k is the same in all its calls, but for k = 0. Hence the k-th best candidate lies in BIN, once BIN has been raised
//   and k candidates have been offered.
// - NaN and infinite entries are never candidates; state[NONFINITE] keeps the lowest position of one.
// - k = 0: accumulate and look for non-finite entries only; values and positions are not touched.
// - A launch that fails on a GPU leaves buffer and state undefined.
#pragma once

#include <optional>

#include "checks.h"
#include "jobs.h"

namespace saft {

TopkBuffer check_topk_buffer(int64_t k, const Tensor& values, const Tensor& positions, const Tensor& state,
                             Device device);

Scan check_scan(const Tensor& acc, const std::optional<Tensor>& grad, double scale, bool square, int64_t key,
                int64_t offset, Device device);

}  // namespace saft
