// scan:    acc[i] += scale * grad[i]          both roundings kept: the same bits as on the CPU
//          if (|acc[i]|, i) beats the bar: append, and count in the histogram
// settle:  take the candidates in, raise the bar, drop what no longer reaches it (settle_topk.cuh)
// refill:  where the candidates did not fit, append those elements of acc that reach the raised bar
//
// scan moves 12 bytes per fp32 element (read acc and grad, write acc), 10 with a 16-bit gradient: 25 million elements,
// 300 MB, take 90 us at the 3.35 TB/s of an H100. Candidates are one in a thousand once the bar has risen, so a warp
// only asks "is there any?" and goes on; with 4 elements per thread and 1024 threads an SM has 32 KB of fp32 under way
// while its two blocks load, where 20 KB hide the latency of its memory. A block ends with barriers, fences and the
// counter below, an estimated 1.5 us in which it moves nothing, twice as long as a part of 2048 elements takes: blocks
// of a large tensor go over several parts first. The bar is the same for all of a launch.
//
// The last block to end settles: one launch for all, and the host need not know whether there is anything to do (no
// synchronisation, and a CUDA graph can hold the call). Which block is the last one tells a counter in the state, which
// belongs to one buffer as everything else here does. Gradients arrive tensor by tensor and are freed at once, so a
// launch for each is what is left: most tensors of a CLIP are biases and gains, whose time is that of a launch.
//
// Candidates do not fit as long as the bar follows from less than a few times k elements, that is for the first
// tensors, and for a tensor with far more large values than all before it. A refill reads acc once more, 4 bytes per
// element. A tensor of a million elements at most is read by the block that settled; for a larger one a launch of its
// own follows in any case, which mostly returns after one look at the state, 1 to 2 us.

#include "accumulate_topk_kernel.h"

#include <algorithm>

#include "numbers.cuh"
#include "settle_topk.cuh"
#include "topk_candidates.cuh"

namespace saft::cuda {
namespace {

// Of a block that scans, of which two share an SM, and of the one block that compacts.
constexpr int kThreads = 512;
constexpr int kCompactThreads = 1024;
constexpr int64_t kPerBlock = kThreads * kEntries;

// Parts of a tensor of more than kAlone elements that a block goes over.
constexpr int64_t kParts = 4;

using ScanSettlement = Settlement<kThreads, 1>;
using CompactSettlement = Settlement<kCompactThreads, 2>;

// Up to how many elements the block that settled refills alone, in half a millisecond at most, and the blocks of a
// launch that does it otherwise.
constexpr int64_t kAlone = int64_t{1} << 20;
constexpr int64_t kRefillBlocks = 512;

struct NoGrad {};

template <typename T>
__device__ void accumulate(const Scan& scan, int64_t first, int count, float (&acc)[kEntries]) {
  T grad[kEntries];
  load_entries(static_cast<const T*>(scan.grad), first, count, grad);
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    float g = to_float(grad[i]);
    if (scan.square) g *= g;
    acc[i] += g * scan.scale;
  }
  store_entries(scan.acc, first, count, acc);
}

// Candidates of a thread's elements; the lowest position of one that is not finite goes to `state`.
__device__ Found beating(const Bar& bar, const float (&acc)[kEntries], int64_t position, int count, int64_t* state) {
  Found found{{}, position, 0};
  int64_t nonfinite = kNoPosition;
#pragma unroll
  for (int i = kEntries - 1; i >= 0; --i) {
    found.bits[i] = magnitude_bits(acc[i]);
    if (i >= count) continue;
    if (found.bits[i] >= kInfinity)
      nonfinite = position + i;
    else if (bar.admits(found.bits[i], position + i))
      found.chosen |= 1u << i;
  }
  if (nonfinite != kNoPosition) atomicMin(reinterpret_cast<long long*>(state + kNonFinite), nonfinite);
  return found;
}

__device__ void count_in_histogram(int64_t* state, const Found& found) {
  const int64_t bin = state[kBin];
  int above = 0;
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    const int own_bin = found.bits[i] >> kBinShift;
    count_each(own_bin, found.has(i), [=](int index, int n) { add(state + kHistogram + index, n); });
    above += __popc(__ballot_sync(kWarp, found.has(i) && own_bin >= bin));
  }
  if (threadIdx.x % 32 == 0 && above > 0) add(state + kAbove, above);
}

// Appends what reaches the bar, of every parts-th part of the tensor from `part` on.
__device__ void refill(const Scan& scan, const TopkBuffer& buffer, int64_t part, int64_t parts) {
  const Bar bar = bar_of(buffer.state);
  for (int64_t start = part * kPerBlock; start < scan.n; start += parts * kPerBlock) {
    const int64_t first = start + threadIdx.x * kEntries;
    const int count = entries_from(first, scan.n);
    float acc[kEntries];
    load_entries(scan.acc, first, count, acc);
    Found found{{}, scan.base + first, 0};
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      found.bits[i] = magnitude_bits(acc[i]);
      if (i < count && found.bits[i] < kInfinity && bar.keeps(found.bits[i], found.position + i))
        found.chosen |= 1u << i;
    }
    append(buffer, 0, buffer.state + kCount, found);
  }
}

// Whether all other blocks have come here; then what they wrote can be read.
__device__ bool is_last_block(int64_t* done) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = add(done, 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    scan_kernel(const __grid_constant__ Scan scan, const __grid_constant__ TopkBuffer buffer, int64_t limit) {
  const Bar bar = bar_of(buffer.state);  // first: the compiler moves no load before the stores
  for (int64_t start = blockIdx.x * kPerBlock; start < scan.n; start += gridDim.x * kPerBlock) {
    const int64_t first = start + threadIdx.x * kEntries;
    const int count = entries_from(first, scan.n);
    float acc[kEntries];
    load_entries(scan.acc, first, count, acc);
    if constexpr (!__is_same(T, NoGrad)) accumulate<T>(scan, first, count, acc);
    const Found found = beating(bar, acc, scan.base + first, count, buffer.state);
    if (buffer.k == 0 || !__any_sync(kWarp, found.chosen)) continue;
    count_in_histogram(buffer.state, found);
    append(buffer, buffer.state[kCount], buffer.state + kFresh, found);
  }
  if (buffer.k == 0 || !is_last_block(buffer.state + kDone)) return;

  __shared__ ScanSettlement::Shared shared;
  const bool overflow = ScanSettlement(scan, buffer, shared).run(limit);
  if (threadIdx.x == 0) {
    buffer.state[kDone] = 0;
    buffer.state[kRefill] = overflow;
  }
  if (overflow && scan.n <= kAlone) refill(scan, buffer, 0, 1);
}

__global__ void __launch_bounds__(kThreads)
    refill_kernel(const __grid_constant__ Scan scan, const __grid_constant__ TopkBuffer buffer) {
  if (buffer.state[kRefill]) refill(scan, buffer, blockIdx.x, gridDim.x);
}

__global__ void __launch_bounds__(kCompactThreads) compact_kernel(const __grid_constant__ TopkBuffer buffer) {
  __shared__ CompactSettlement::Shared shared;
  CompactSettlement(Scan{}, buffer, shared).run(buffer.k);
}

// Nothing is to be kept.
__global__ void clear_kernel(int64_t* state) {
  state[kCount] = 0;
}

template <typename T>
void launch_scan(const Scan& scan, const TopkBuffer& buffer, cudaStream_t stream) {
  // Half of the room beyond the k best is left for the next tensor.
  const int64_t limit = buffer.k + (buffer.capacity - buffer.k) / 2;
  const int64_t parts = ceil_div(scan.n, kPerBlock), blocks = scan.n > kAlone ? ceil_div(parts, kParts) : parts;
  scan_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(scan, buffer, limit);
}

void launch_typed_scan(const Scan& scan, const TopkBuffer& buffer, cudaStream_t stream) {
  switch (scan.type) {
    case FloatType::fp32:
      return launch_scan<float>(scan, buffer, stream);
    case FloatType::bf16:
      return launch_scan<BFloat16>(scan, buffer, stream);
    case FloatType::fp16:
      return launch_scan<Half>(scan, buffer, stream);
    default:
      return launch_scan<NoGrad>(scan, buffer, stream);
  }
}

}  // namespace

cudaError_t launch_accumulate_topk(const Scan& scan, const TopkBuffer& buffer, cudaStream_t stream) {
  if (scan.n == 0) return cudaSuccess;
  launch_typed_scan(scan, buffer, stream);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess || buffer.k == 0 || scan.n <= kAlone) return status;
  const auto blocks = static_cast<unsigned>(std::min(ceil_div(scan.n, kPerBlock), kRefillBlocks));
  refill_kernel<<<blocks, kThreads, 0, stream>>>(scan, buffer);
  return cudaGetLastError();
}

cudaError_t launch_compact_topk(const TopkBuffer& buffer, cudaStream_t stream) {
  if (buffer.k == 0)
    clear_kernel<<<1, 1, 0, stream>>>(buffer.state);
  else
    compact_kernel<<<1, kCompactThreads, 0, stream>>>(buffer);
  return cudaGetLastError();
}

}  // namespace saft::cuda
