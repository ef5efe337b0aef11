// for each selected entry (w, g, m, v):
//   m  = lerp(m, g, 1 - beta1)
//   v  = beta2 v + (1 - beta2) g^2
//   w  = w (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// An entry moves its index (4 bytes), m and v (read and written, 16), and the 32-byte sector of w (read and written,
// 64); its gradient is 4 bytes of a compact vector or another sector (32). The 149,620 entries of CLIP ViT-B/16 at 0.1%
// are 13 MB with compact gradients and 17 MB with dense ones: 4 and 5 us of an H100's 3.35 TB/s, where AdamW over all
// of the 149.6 million weights moves 28 bytes of each, 4.2 GB in 1.25 ms.
//
// At this size the time is that of two dependent accesses to memory, index and then weight, if everything is under way
// at once. So one launch serves all tensors; every block belongs to one tensor, whose pointers, layout and step count
// are then the same for all of its threads; a thread takes four entries, whose indices and moments are 16-byte loads,
// and asks for all it needs before it uses any.
//
// The step counts are incremented by a launch of its own, behind the one that reads them. The last block to finish
// could do it, but telling which is the last takes a counter that lives between calls and that no two streams may
// share; a launch of a few threads costs a microsecond or two and cannot go wrong.

#include <cmath>
#include <type_traits>

#include "adamw_table.h"
#include "numbers.cuh"
#include "sparse_adamw_kernel.h"
#include "vectors.cuh"

namespace saft::cuda {
namespace {

// Small, since most tensors have less than a block's 512 entries, and so that the multiprocessors get equal shares.
constexpr int kThreads = 128;

__device__ double read(const Scalar& scalar) {
  if (!scalar.data) return scalar.value;
  return scalar.is_double ? *static_cast<const double*>(scalar.data) : *static_cast<const float*>(scalar.data);
}

// The tensor that a block belongs to; those without entries have no blocks.
__device__ int segment_of(const AdamWTable& table, int block) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.segments[middle].first_block <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Memory offsets, in elements, of flat indices in logical row-major order.
template <typename Index>
__device__ void places_of(const AdamWTable& table, PooledLayout layout, const Index (&index)[kEntries],
                          int64_t (&place)[kEntries]) {
  using Unsigned = std::conditional_t<sizeof(Index) == 4, uint32_t, uint64_t>;  // 32-bit divisions are far cheaper
  constexpr int64_t kLargest = sizeof(Index) == 4 ? UINT32_MAX : INT64_MAX;
  Unsigned rest[kEntries];
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    rest[i] = static_cast<Unsigned>(index[i]);
    place[i] = 0;
  }
#pragma unroll 1
  for (int d = layout.dims - 1; d >= 0; --d) {
    const Dim dim = table.pool[layout.first + d];
    const auto size = static_cast<Unsigned>(min(dim.size, kLargest));  // larger than every index either way
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      place[i] += static_cast<int64_t>(rest[i] % size) * dim.stride;
      rest[i] /= size;
    }
  }
#pragma unroll
  for (int i = 0; i < kEntries; ++i) place[i] += static_cast<int64_t>(rest[i]);  // of a contiguous tensor, else 0
}

// All loads under way before the first is used.
template <typename T>
__device__ void load_at(const T* from, const int64_t (&place)[kEntries], int count, T (&to)[kEntries]) {
#pragma unroll
  for (int i = 0; i < kEntries; ++i) to[i] = i < count ? from[place[i]] : T{};
}

// 1 - beta^t = -(e^x - 1) with x = t log beta. A relative error of x becomes one of x e^x / (1 - e^x), less than
// itself: two roundings of x and expm1's own ulp make two ulps at most, for every t and beta (1.5 seen),
// where powers in fp32 would lose all digits of beta^t near one, and fp64 is slow on all but the largest GPUs.
__device__ float bias_correction(float log_beta, float t) {
  return -expm1f(t * log_beta);
}

// What all entries of a tensor share in a step.
struct Factors {
  float keep;  // 1 - lr weight_decay
  float inverse_grad_scale;
  float step_size;         // lr / (1 - beta1^t)
  float bias_correction2;  // sqrt(1 - beta2^t)
};

__device__ Factors factors_of(const AdamW& hyper, float t) {
  const double rate = read(hyper.lr);
  return {static_cast<float>(1 - rate * hyper.weight_decay), static_cast<float>(1 / read(hyper.grad_scale)),
          static_cast<float>(rate) / bias_correction(hyper.log_beta1, t), sqrtf(bias_correction(hyper.log_beta2, t))};
}

// As torch: starts from the end that is nearer, so that beta1 = 0 gives g itself.
__device__ float lerp(float m, float g, const AdamW& hyper) {
  return hyper.one_minus_beta1 < 0.5f ? m + hyper.one_minus_beta1 * (g - m) : g - (g - m) * hyper.beta1;
}

// The order of operations is that of torch's AdamW and of the CPU kernel.
__device__ void update(const AdamW& hyper, const Factors& f, float gradient, float& w, float& m, float& v) {
  const float g = gradient * f.inverse_grad_scale * hyper.sign;
  m = lerp(m, g, hyper);
  v = v * hyper.beta2 + hyper.one_minus_beta2 * g * g;
  w = w * f.keep - f.step_size * m / (sqrtf(v) / f.bias_correction2 + hyper.eps);
}

template <typename T, typename Index>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const __grid_constant__ AdamWTable table, const __grid_constant__ AdamWVectors vectors,
                const float* __restrict__ step, const __grid_constant__ AdamW hyper, int shift) {
  const int block = static_cast<int>(blockIdx.x);
  const int s = segment_of(table, block);
  const Segment& segment = table.segments[s];
  const int64_t chunk =
      (segment.first_entry + shift) / kEntries + int64_t{block - segment.first_block} * kThreads + threadIdx.x;
  const int64_t first = max(chunk * kEntries - shift, segment.first_entry);
  const int64_t end = min((chunk + 1) * kEntries - shift, table.segments[s + 1].first_entry);
  if (first >= end) return;
  const int count = static_cast<int>(end - first);

  Index index[kEntries];
  float m[kEntries], v[kEntries], w[kEntries], gradient[kEntries];
  load_entries(static_cast<const Index*>(vectors.indices.data), first, count, index);
  load_entries(vectors.exp_avg, first, count, m);
  load_entries(vectors.exp_avg_sq, first, count, v);
  if constexpr (!std::is_same_v<T, float>) load_entries(vectors.master, first, count, w);
  if (vectors.grad) load_entries(vectors.grad, first, count, gradient);
  const float t = step[s] + 1;
  const bool skip = read(hyper.found_inf) != 0;

  T* const param = static_cast<T*>(segment.param);
  int64_t place[kEntries];
  places_of(table, segment.param_layout, index, place);
  if constexpr (std::is_same_v<T, float>) load_at(param, place, count, w);
  if (!vectors.grad) {
    int64_t grad_place[kEntries];
    T loaded[kEntries];
    places_of(table, segment.grad_layout, index, grad_place);
    load_at(static_cast<const T*>(segment.grad), grad_place, count, loaded);
#pragma unroll
    for (int i = 0; i < kEntries; ++i) gradient[i] = to_float(loaded[i]);
  }
  if (skip) return;

  const Factors factors = factors_of(hyper, t);
#pragma unroll
  for (int i = 0; i < kEntries; ++i) update(hyper, factors, gradient[i], w[i], m[i], v[i]);
#pragma unroll
  for (int i = 0; i < kEntries; ++i)
    if (i < count) param[place[i]] = from_float<T>(w[i]);
  store_entries(vectors.exp_avg, first, count, m);
  store_entries(vectors.exp_avg_sq, first, count, v);
  if constexpr (!std::is_same_v<T, float>) store_entries(vectors.master, first, count, w);
}

__global__ void __launch_bounds__(kThreads)
    count_kernel(float* __restrict__ step, int64_t count, const __grid_constant__ Scalar found_inf) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count && read(found_inf) == 0) step[i] += 1;
}

// Entries that a thread's loads must not cross to be wide: the optimizer's vectors may begin anywhere in its flat ones,
// all of them equally.
int misalignment(const float* vector) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(vector) / sizeof(float) % kEntries);
}

template <typename T, typename Index>
cudaError_t launch_steps(const AdamWJob& job, const AdamW& hyper, cudaStream_t stream) {
  const int shift = misalignment(job.vectors.exp_avg);
  for (int64_t begin = 0, i = 0; begin < job.count; begin = i) {
    AdamWTable table;
    TableFiller filler(table, kEntries, shift, kThreads);
    while (i < job.count && filler.add(job.tensors[i], job.bounds[i], job.bounds[i + 1])) ++i;
    const int blocks = table.segments[table.count].first_block;
    if (blocks == 0) continue;
    step_kernel<T, Index><<<blocks, kThreads, 0, stream>>>(table, job.vectors, job.step + begin, hyper, shift);
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t launch_typed(const AdamWJob& job, const AdamW& hyper, cudaStream_t stream) {
  return job.vectors.indices.wide ? launch_steps<T, int64_t>(job, hyper, stream)
                                  : launch_steps<T, int32_t>(job, hyper, stream);
}

cudaError_t launch_all_steps(const AdamWJob& job, const AdamW& hyper, cudaStream_t stream) {
  switch (hyper.type) {
    case FloatType::bf16:
      return launch_typed<BFloat16>(job, hyper, stream);
    case FloatType::fp16:
      return launch_typed<Half>(job, hyper, stream);
    default:
      return launch_typed<float>(job, hyper, stream);
  }
}

}  // namespace

cudaError_t launch_sparse_adamw(const AdamWJob& job, const AdamW& hyper, cudaStream_t stream) {
  const cudaError_t status = launch_all_steps(job, hyper, stream);
  if (status != cudaSuccess || job.count == 0) return status;
  const auto blocks = static_cast<unsigned>(ceil_div(job.count, kThreads));
  count_kernel<<<blocks, kThreads, 0, stream>>>(job.step, job.count, hyper.found_inf);
  return cudaGetLastError();
}

}  // namespace saft::cuda
