// scan:    acc[i] += scale * grad[i]          both roundings kept: the same bits as on the CPU
//          if (|acc[i]|, i) beats the bar: append, and count in the histogram
// settle:  take the candidates in, raise the bar, drop what no longer reaches it (settle_topk_kernel.cu)
// refill:  where the candidates did not fit, append those elements of acc that reach the raised bar
//
// scan moves 12 bytes per fp32 element (read acc and grad, write acc), 10 with a 16-bit gradient: 25 million elements,
// 300 MB, take 90 us at the 3.35 TB/s of an H100. Candidates are one in a thousand once the bar has risen, so a warp
// only asks "is there any?" and goes on; with 4 elements per thread an SM has 64 KB under way, four times what the
// latency of its memory asks for. The bar is the same for all of a launch.
//
// settle and refill are launched in any case, so that the host need not know whether they have anything to do (no
// synchronisation, and a CUDA graph can hold the call). Mostly they have not, and return after one look at the state:
// 1 to 2 us each, the time of launching them. Candidates do not fit as long as the bar follows from less than a few
// times k elements, that is for the first tensors, and for a tensor with far more large values than all before it.
// A refill reads acc once more, 4 bytes per element.

#include "accumulate_topk_kernel.h"

#include <algorithm>

#include "numbers.cuh"
#include "settle_topk_kernel.h"
#include "topk_candidates.cuh"

namespace saft::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPerBlock = kThreads * kEntries;

// Blocks of a refill, each of which goes over many parts of the tensor: they are all resident at once, and so return
// at once where there is nothing to do.
constexpr int64_t kRefillBlocks = 1024;

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

template <typename T>
__global__ void __launch_bounds__(kThreads)
    scan_kernel(const __grid_constant__ Scan scan, const __grid_constant__ TopkBuffer buffer) {
  const int64_t first = blockIdx.x * kPerBlock + threadIdx.x * kEntries;
  const int count = entries_from(first, scan.n);
  float acc[kEntries];
  load_entries(scan.acc, first, count, acc);
  if constexpr (!__is_same(T, NoGrad)) accumulate<T>(scan, first, count, acc);
  Found found = beating(bar_of(buffer.state), acc, scan.base + first, count, buffer.state);
  if (buffer.k == 0 || !__any_sync(kWarp, found.chosen)) return;
  count_in_histogram(buffer.state, found);
  append(buffer, buffer.state[kCount], buffer.state + kFresh, found);
}

__global__ void __launch_bounds__(kThreads)
    refill_kernel(const __grid_constant__ Scan scan, const __grid_constant__ TopkBuffer buffer) {
  if (buffer.state[kRefill] == 0) return;
  const Bar bar = bar_of(buffer.state);
  for (int64_t start = blockIdx.x * kPerBlock; start < scan.n; start += gridDim.x * kPerBlock) {
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

template <typename T>
void launch_scan(const Scan& scan, const TopkBuffer& buffer, cudaStream_t stream) {
  scan_kernel<T><<<static_cast<unsigned>(ceil_div(scan.n, kPerBlock)), kThreads, 0, stream>>>(scan, buffer);
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
  if (status != cudaSuccess || buffer.k == 0) return status;
  // Half of the room beyond the k best is left for the next tensor.
  const int64_t limit = buffer.k + (buffer.capacity - buffer.k) / 2;
  const cudaError_t settled = launch_settle_topk(scan, buffer, limit, stream);
  if (settled != cudaSuccess) return settled;
  const auto blocks = static_cast<unsigned>(std::min(ceil_div(scan.n, kPerBlock), kRefillBlocks));
  refill_kernel<<<blocks, kThreads, 0, stream>>>(scan, buffer);
  return cudaGetLastError();
}

cudaError_t launch_compact_topk(const TopkBuffer& buffer, cudaStream_t stream) {
  return launch_settle_topk(Scan{}, buffer, buffer.k, stream);
}

}  // namespace saft::cuda
