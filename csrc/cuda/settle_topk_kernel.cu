// What a scan has found joins the buffer, and the threshold follows, all in one block:
//
//   raise:   while k candidates lie above the lower edge of the next histogram bin: bin += 1
//            threshold = lower edge of that bin
//   search:  if more than `limit` candidates reach that: the bound's next digits, 9 bits at a time, first of the
//            value, then, among equal values, of the position, until no more than `limit` reach it. Candidates are
//            those of the buffer, or, if the scan's did not fit, those from before it and all elements of the tensor.
//   drop:    remove from the buffer, in place, what does not reach the threshold
//
// Mostly nothing is to be done: the block reads seven numbers and writes seven. Otherwise it works alone, which is
// enough for what it has to do (times are estimates for an H100). Dropping moves up to 24 bytes per candidate, for
// d = 0.1% of 150 million parameters 300,000 candidates, 7.2 MB, in steps of 4096 that each wait for memory once: about
// 1 us a step, 0.1 ms in all, and ten to twenty times in a selection. At d = 10 million it is 240 MB of candidates, 5
// ms. A search reads values (4 bytes), twice at most unless many are equal. It pays for many equal values in a tensor
// that does not fit: 4 bytes for each of its elements and each digit, at most 9, at the 50 to 100 GB/s of one SM; 100
// MB of zeros that come first take 10 ms, once. cub's device-wide algorithms would need their sizes on the host, a
// synchronisation in every call, and memory for a second copy of the candidates.
//
// Within the block every thread keeps its own copy of the state; the copies stay equal, and thread 0 writes them back.

#include "settle_topk_kernel.h"

#include <cub/block/block_scan.cuh>

#include "topk_candidates.cuh"

namespace saft::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int64_t kStep = int64_t{kThreads} * kEntries;
constexpr int kPlaceBits = 63;
constexpr int kDigitBits = 9;
constexpr int kDigits = 1 << kDigitBits;
static_assert(kDigits <= kThreads);

using BlockScan = cub::BlockScan<int64_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;

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

struct Shared {
  BlockScan::TempStorage scan;
  Counts counts;
  // What one thread found for all.
  int64_t passed;
  int digit;
  int64_t above, within;
};

// Moves `bin` to the highest bin that k candidates reach, a block's width at a time. Their number is `above`.
__device__ void raise_to_bin(int64_t& bin, int64_t& above, int64_t k, const int64_t* histogram, Shared& shared) {
  while (bin + 1 < kBins && above - histogram[bin] >= k) {
    const int64_t own_bin = bin + threadIdx.x;
    int64_t upto = 0;
    BlockScan(shared.scan).InclusiveSum(own_bin < kBins ? histogram[own_bin] : 0, upto);
    const int steps = __syncthreads_count(own_bin + 1 < kBins && above - upto >= k);
    if (threadIdx.x == steps - 1) shared.passed = upto;
    __syncthreads();
    bin += steps;
    above -= shared.passed;
  }
}

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

// Counts the next digit of every candidate that has the bound's known bits.
template <typename PositionOf>
__device__ void count_digits(const Bound& bound, int shift, const float* values, int64_t n, PositionOf position_of,
                             Counts& counts) {
  for (int64_t start = 0; start < n; start += kStep) {
    const int64_t first = start + threadIdx.x * kEntries;
    const int count = entries_from(first, n);
    float value[kEntries];
    load_entries(values, first, count, value);
    for (int i = 0; i < kEntries; ++i) {
      const int32_t bits = magnitude_bits(value[i]);
      bool matches = i < count && bound.matches(bits);
      int64_t digits = bits >> shift;
      if (matches && bound.bits_unknown == 0) {
        const int64_t place = kNoPosition - position_of(first + i);
        matches = bound.matches_place(place);
        digits = place >> shift;
      }
      count_each(static_cast<int>(digits & (kDigits - 1)), matches, [&](int digit, int n) { counts.add(digit, n); });
    }
  }
}

// Adds the digit to the bound that the candidate of this rank (from 1) has among those with the known bits; the rank
// then is that among those with the digit too. Returns how many these are.
__device__ int64_t add_digit(Bound& bound, int64_t& rank, const Scan& scan, int64_t n_elements,
                             const TopkBuffer& buffer, int64_t n, Shared& shared) {
  const bool in_bits = bound.bits_unknown > 0;
  const int shift = max((in_bits ? bound.bits_unknown : bound.place_unknown) - kDigitBits, 0);
  if (threadIdx.x < kDigits) shared.counts.low[threadIdx.x] = shared.counts.high[threadIdx.x] = 0;
  if (threadIdx.x == 0) shared.digit = 0, shared.above = 0, shared.within = 0;
  __syncthreads();
  count_digits(bound, shift, buffer.values, n, [&](int64_t i) { return buffer.positions[i]; }, shared.counts);
  count_digits(bound, shift, scan.acc, n_elements, [&](int64_t i) { return scan.base + i; }, shared.counts);
  __syncthreads();
  const int digit = kDigits - 1 - static_cast<int>(threadIdx.x);
  const int64_t own = digit >= 0 ? shared.counts[digit] : 0;
  int64_t upto = 0;
  BlockScan(shared.scan).InclusiveSum(own, upto);
  if (upto - own < rank && rank <= upto) shared.digit = digit, shared.above = upto - own, shared.within = own;
  __syncthreads();
  if (in_bits) {
    bound.bits |= shared.digit << shift;
    bound.bits_unknown = shift;
  } else {
    bound.place |= int64_t{shared.digit} << shift;
    bound.place_unknown = shift;
  }
  rank -= shared.above;
  const int64_t within = shared.within;
  __syncthreads();
  return within;
}

// Removes from the first n candidates those that the bar does not keep; returns how many stay. Writes never pass the
// reads: a step is read, then (behind the barriers of the scan) written at or before its own begin.
__device__ int64_t drop_below(const Bar& bar, const TopkBuffer& buffer, int64_t n, Shared& shared) {
  int64_t kept = 0;
  for (int64_t start = 0; start < n; start += kStep) {
    const int64_t first = start + threadIdx.x * kEntries;
    const int count = entries_from(first, n);
    float value[kEntries];
    int64_t position[kEntries];
    load_entries(buffer.values, first, count, value);
    load_entries(buffer.positions, first, count, position);
    unsigned chosen = 0;
#pragma unroll
    for (int i = 0; i < kEntries; ++i)
      if (i < count && bar.keeps(magnitude_bits(value[i]), position[i])) chosen |= 1u << i;
    int64_t slot = 0, total = 0;
    BlockScan(shared.scan).ExclusiveSum(__popc(chosen), slot, total);
    slot += kept;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      if (!(chosen >> i & 1)) continue;
      buffer.values[slot] = value[i];
      buffer.positions[slot++] = position[i];
    }
    kept += total;
    __syncthreads();
  }
  return kept;
}

// The higher of two bars, both of which the k best candidates pass.
__device__ Bar higher(const Bar& a, const Bar& b) {
  return a.bits > b.bits || (a.bits == b.bits && a.tie < b.tie) ? a : b;
}

// The k-th best candidate of the buffer's first n and of the tensor, or a bound below it that no more than `limit`
// candidates reach. It lies in `bin`, which is where the search begins.
__device__ Bar search(const Scan& scan, int64_t n_elements, const TopkBuffer& buffer, int64_t n, int64_t limit,
                      int64_t bin, int64_t above, Shared& shared) {
  Bound bound{static_cast<int32_t>(bin << kBinShift), kBinShift, 0, kPlaceBits};
  int64_t rank = buffer.k - (above - buffer.state[kHistogram + bin]);
  for (int64_t reach = above; reach > limit && !bound.is_complete();) {
    const int64_t within = add_digit(bound, rank, scan, n_elements, buffer, n, shared);
    reach = buffer.k - rank + within;
  }
  return {bound.bits, kNoPosition - bound.place};
}

__global__ void __launch_bounds__(kThreads)
    settle_kernel(const __grid_constant__ Scan scan, const __grid_constant__ TopkBuffer buffer, int64_t limit) {
  __shared__ Shared shared;
  int64_t* const state = buffer.state;
  const int64_t before = state[kCount], all = before + state[kFresh];
  int64_t bin = state[kBin], above = state[kAbove];
  Bar bar = bar_of(state);

  raise_to_bin(bin, above, buffer.k, state + kHistogram, shared);
  if (above >= buffer.k) bar = higher(bar, {static_cast<int32_t>(bin << kBinShift), kNoPosition});
  const bool overflow = all > buffer.capacity;
  int64_t count = overflow ? before : all;
  if (all > limit) {
    bar = higher(bar, search(scan, overflow ? scan.n : 0, buffer, count, limit, bin, above, shared));
    count = drop_below(bar, buffer, count, shared);
  }

  __syncthreads();  // all have read the state
  if (threadIdx.x != 0) return;
  state[kCount] = count;
  state[kFresh] = 0;
  state[kRefill] = overflow;
  state[kBin] = bin;
  state[kAbove] = above;
  state[kThreshold] = bar.bits;
  state[kTie] = bar.tie;
}

// Nothing is to be kept.
__global__ void clear_kernel(int64_t* state) {
  state[kCount] = 0;
}

}  // namespace

cudaError_t launch_settle_topk(const Scan& scan, const TopkBuffer& buffer, int64_t limit, cudaStream_t stream) {
  if (buffer.k == 0)
    clear_kernel<<<1, 1, 0, stream>>>(buffer.state);
  else
    settle_kernel<<<1, kThreads, 0, stream>>>(scan, buffer, limit);
  return cudaGetLastError();
}

}  // namespace saft::cuda
