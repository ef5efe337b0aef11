// What a scan has found joins the buffer, and the threshold follows, all in one block:
//
//   raise:   while k candidates lie above the lower edge of the next histogram bin: bin += 1
//            threshold = lower edge of that bin
//   search:  if more than `limit` candidates reach that: the bound's next digits, 9 bits at a time, first of the
//            value, then, among equal values, of the position, until no more than `limit` reach it. Candidates are
//            those of the buffer, or, if the scan's did not fit, those from before it and all elements of the tensor.
//   drop:    remove from the buffer, in place, what does not reach the threshold
//
// Mostly nothing is to be done: the block reads eight numbers and writes as many. Otherwise it works alone, which is
// enough for what it has to do (times are estimates for an H100). Dropping moves up to 24 bytes per candidate at the 50
// to 100 GB/s of one SM, or a step each microsecond: a million candidates take 0.5 ms behind a scan, whose registers
// allow one way, and with the buffer that StreamingTopK makes a selection of d = 0.1% of 150 million parameters drops
// once or twice. At d = 10 million it is 20 million candidates, 10 ms, ten to twenty times. A search reads values (4
// bytes), twice at most unless many are equal. It pays for many equal values in a tensor that does not fit: 4 bytes for
// each of its elements and each digit, at most 9; 100 MB of zeros that come first take 10 ms, once. cub's device-wide
// algorithms would need their sizes on the host, a synchronisation in every call, and memory for a second copy of the
// candidates.
//
// Within the block every thread keeps its own copy of the state; the copies stay equal, and thread 0 writes them back.
#pragma once

#include <cub/block/block_scan.cuh>

#include "topk_candidates.cuh"

namespace saft::cuda {

constexpr int kPlaceBits = 63;
constexpr int kDigitBits = 9;
constexpr int kDigits = 1 << kDigitBits;

// Counters of 64 bits in shared memory, which has atomics of 32.
struct Counts {
  unsigned low[kDigits];
  unsigned high[kDigits];

  __device__ void add(int i, unsigned n) {
    const unsigned before = atomicAdd(low + i, n);
    if (before + n < before) atomicAdd(high + i, 1u);
  }

  __device__ int64_t operator[](int i) const { return int64_t{high[i]} << 32 | low[i]; }
};

// A bound of which only the leading bits are known, those behind them being zero. Better candidates are greater: the
// place of one is kNoPosition minus its position.
struct Bound {
  int32_t bits;
  int bits_unknown;
  int64_t place;
  int place_unknown;

  __device__ bool is_complete() const { return bits_unknown == 0 && place_unknown == 0; }

  // Whether a candidate has the known bits.
  __device__ bool matches(int32_t candidate) const { return (candidate ^ bits) >> bits_unknown == 0; }
  __device__ bool matches_place(int64_t candidate) const { return (candidate ^ place) >> place_unknown == 0; }
};

// The higher of two bars, both of which the k best candidates pass.
__device__ inline Bar higher(const Bar& a, const Bar& b) {
  return a.bits > b.bits || (a.bits == b.bits && a.tie < b.tie) ? a : b;
}

// The work of one block of that many threads, each of which has the loads of kWays times kEntries candidates under way.
template <int kThreads, int kWays>
class Settlement {
  using BlockScan = cub::BlockScan<int64_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  static constexpr int64_t kStep = int64_t{kThreads} * kEntries * kWays;
  static_assert(kDigits <= kThreads);

 public:
  struct Shared {
    typename BlockScan::TempStorage scan;
    Counts counts;
    // What one thread found for all.
    int64_t passed;
    int digit;
    int64_t above, within;
  };

  __device__ Settlement(const Scan& scan, const TopkBuffer& buffer, Shared& shared)
      : scan_(scan), buffer_(buffer), shared_(shared) {}

  // Leaves at most `limit` >= k candidates. Returns whether the scan's did not fit: then the buffer has room for those
  // elements of the tensor that reach the new threshold.
  __device__ bool run(int64_t limit) {
    int64_t* const state = buffer_.state;
    // An entry that was offered many times can have been counted into a buffer without room for it.
    const int64_t before = min(state[kCount], buffer_.capacity), all = before + state[kFresh];
    bin_ = state[kBin];
    above_ = state[kAbove];
    Bar bar = bar_of(state);

    raise_to_bin();
    if (above_ >= buffer_.k) bar = higher(bar, {static_cast<int32_t>(bin_ << kBinShift), kNoPosition});
    const bool overflow = all > buffer_.capacity;
    int64_t count = overflow ? before : all;
    if (all > limit) {
      bar = higher(bar, search(count, overflow ? scan_.n : 0, limit));
      count = drop_below(bar, count);
    }

    __syncthreads();  // all have read the state
    if (threadIdx.x == 0) {
      state[kCount] = count;
      state[kFresh] = 0;
      state[kBin] = bin_;
      state[kAbove] = above_;
      state[kThreshold] = bar.bits;
      state[kTie] = bar.tie;
    }
    __syncthreads();
    return overflow;
  }

 private:
  // Moves to the highest bin that k candidates reach, a block's width at a time.
  __device__ void raise_to_bin() {
    const int64_t* const histogram = buffer_.state + kHistogram;
    while (bin_ + 1 < kBins && above_ - histogram[bin_] >= buffer_.k) {
      const int64_t own_bin = bin_ + threadIdx.x;
      int64_t upto = 0;
      BlockScan(shared_.scan).InclusiveSum(own_bin < kBins ? histogram[own_bin] : 0, upto);
      const int steps = __syncthreads_count(own_bin + 1 < kBins && above_ - upto >= buffer_.k);
      if (threadIdx.x == steps - 1) shared_.passed = upto;
      __syncthreads();
      bin_ += steps;
      above_ -= shared_.passed;
    }
  }

  // The k-th best candidate of the buffer's first n and of the tensor's first n_elements, or a bound below it that no
  // more than `limit` candidates reach. It lies in the bin that was raised to, which is where the search begins.
  __device__ Bar search(int64_t n, int64_t n_elements, int64_t limit) {
    Bound bound{static_cast<int32_t>(bin_ << kBinShift), kBinShift, 0, kPlaceBits};
    int64_t rank = buffer_.k - (above_ - buffer_.state[kHistogram + bin_]);
    for (int64_t reach = above_; reach > limit && !bound.is_complete();) {
      const int64_t within = add_digit(bound, rank, n, n_elements);
      reach = buffer_.k - rank + within;
    }
    return {bound.bits, kNoPosition - bound.place};
  }

  // Adds the digit to the bound that the candidate of this rank (from 1) has among those with the known bits; the rank
  // then is that among those with the digit too. Returns how many these are.
  __device__ int64_t add_digit(Bound& bound, int64_t& rank, int64_t n, int64_t n_elements) {
    const bool in_bits = bound.bits_unknown > 0;
    const int shift = max((in_bits ? bound.bits_unknown : bound.place_unknown) - kDigitBits, 0);
    if (threadIdx.x < kDigits) shared_.counts.low[threadIdx.x] = shared_.counts.high[threadIdx.x] = 0;
    if (threadIdx.x == 0) shared_.digit = 0, shared_.above = 0, shared_.within = 0;
    __syncthreads();
    count_digits(bound, shift, buffer_.values, n, [&](int64_t i) { return buffer_.positions[i]; });
    count_digits(bound, shift, scan_.acc, n_elements, [&](int64_t i) { return scan_.base + i; });
    __syncthreads();
    const int digit = kDigits - 1 - static_cast<int>(threadIdx.x);
    const int64_t own = digit >= 0 ? shared_.counts[digit] : 0;
    int64_t upto = 0;
    BlockScan(shared_.scan).InclusiveSum(own, upto);
    if (upto - own < rank && rank <= upto) shared_.digit = digit, shared_.above = upto - own, shared_.within = own;
    __syncthreads();
    if (in_bits) {
      bound.bits |= shared_.digit << shift;
      bound.bits_unknown = shift;
    } else {
      bound.place |= int64_t{shared_.digit} << shift;
      bound.place_unknown = shift;
    }
    rank -= shared_.above;
    const int64_t within = shared_.within;
    __syncthreads();
    return within;
  }

  // Counts the next digit of every candidate that has the bound's known bits.
  template <typename PositionOf>
  __device__ void count_digits(const Bound& bound, int shift, const float* values, int64_t n, PositionOf position_of) {
    for (int64_t start = 0; start < n; start += kStep) {
      float value[kWays][kEntries];
#pragma unroll
      for (int way = 0; way < kWays; ++way) {
        const int64_t first = first_of(start, way);
        load_entries(values, first, entries_from(first, n), value[way]);
      }
#pragma unroll
      for (int way = 0; way < kWays; ++way) {
        for (int i = 0; i < kEntries; ++i) {
          const int64_t own = first_of(start, way) + i;
          const int32_t bits = magnitude_bits(value[way][i]);
          bool matches = own < n && bound.matches(bits);
          int64_t digits = bits >> shift;
          if (matches && bound.bits_unknown == 0) {
            const int64_t place = kNoPosition - position_of(own);
            matches = bound.matches_place(place);
            digits = place >> shift;
          }
          count_each(static_cast<int>(digits & (kDigits - 1)), matches,
                     [&](int digit, int n) { shared_.counts.add(digit, n); });
        }
      }
    }
  }

  // Removes from the first n candidates those that the bar does not keep; returns how many stay. Writes never pass the
  // reads: a step is read, then (behind the barriers of the scan) written at or before its own begin.
  __device__ int64_t drop_below(const Bar& bar, int64_t n) {
    int64_t kept = 0;
    for (int64_t start = 0; start < n; start += kStep) {
      float value[kWays][kEntries];
      int64_t position[kWays][kEntries];
#pragma unroll
      for (int way = 0; way < kWays; ++way) {
        const int64_t first = first_of(start, way);
        load_entries(buffer_.values, first, entries_from(first, n), value[way]);
        load_entries(buffer_.positions, first, entries_from(first, n), position[way]);
      }
      unsigned chosen = 0;
#pragma unroll
      for (int way = 0; way < kWays; ++way)
#pragma unroll
        for (int i = 0; i < kEntries; ++i)
          if (first_of(start, way) + i < n && bar.keeps(magnitude_bits(value[way][i]), position[way][i]))
            chosen |= 1u << (way * kEntries + i);
      int64_t slot = 0, total = 0;
      BlockScan(shared_.scan).ExclusiveSum(__popc(chosen), slot, total);
      slot += kept;
#pragma unroll
      for (int way = 0; way < kWays; ++way)
#pragma unroll
        for (int i = 0; i < kEntries; ++i) {
          if (!(chosen >> (way * kEntries + i) & 1)) continue;
          buffer_.values[slot] = value[way][i];
          buffer_.positions[slot++] = position[way][i];
        }
      kept += total;
      __syncthreads();
    }
    return kept;
  }

  // The first of this thread's elements of a step that begins at `start`.
  __device__ static int64_t first_of(int64_t start, int way) {
    return start + (int64_t{way} * kThreads + threadIdx.x) * kEntries;
  }

  const Scan& scan_;
  const TopkBuffer& buffer_;
  Shared& shared_;
  // The highest bin that k candidates reach, and how many reach it.
  int64_t bin_, above_;
};

}  // namespace saft::cuda
