// pack:     packed[b, c, t] = x[16 b + t, columns[c]]
// entries:  grad[e] = sum over t of dy[t, row of e] * x[t, column of e]
//
// Bytes, for T tokens, C packed columns, R used rows, n entries and b bytes per number. Packing reads the sectors of x
// that hold a used column (all of x where C is near I) and writes T C b. The sum reads the sectors of dy that hold a
// used row and T C b of packed columns from memory, once as long as L2 holds what the entries of a part share; from L2
// each entry reads T b of its column. For a matrix of 3072 x 768 in bf16, T = 25,216 and one entry in a thousand
// (n = 2,359, R = 1,666, C = 733), measured on an H200 (4.25 TB/s copied; docs/gpu.md):
//
//   pack     39 MB read, 37 MB written                                        28 us, of 18 at the speed of a copy
//   entries  155 MB of dy and 37 MB of columns, 119 MB of columns from L2     76 us, of 45 without those from L2
//
// A warp's 32 entries are neighbours in row order, so that for one token they read a short piece of dy: one load of a
// few sectors. 16 tokens of a packed column are whole sectors, loaded as 16-byte pieces.

#include "sampled_grad_kernel.h"
#include "sums.cuh"

namespace saft::cuda {
namespace {

constexpr int kThreads = 128;

// Packing ------------------------------------------------------------------------------------------------------------

template <typename P, typename T>
__device__ inline P packed_as(T x) {
  if constexpr (sizeof(P) == sizeof(T))
    return x;
  else
    return from_float<P>(x);
}

// One thread per token block and column, columns first.
template <typename T, typename P>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackColumns job, unsigned chunks) {
  const int64_t c = int64_t{blockIdx.x % chunks} * kThreads + threadIdx.x;
  const int64_t block = blockIdx.x / chunks;
  if (c >= job.n_columns) return;
  const TokenMajor& x = job.x;
  const int64_t first = block * kTokens, left = x.tokens - first, column = job.columns[c];
  P values[kTokens];
  if (column == x.width) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) values[t] = from_float<P>(t < left ? 1.0f : 0.0f);
  } else {
    T loaded[kTokens];
    load_tokens(static_cast<const T*>(x.data) + first * x.token_stride + column * x.column_stride, x.token_stride, left,
                loaded);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) values[t] = packed_as<P>(loaded[t]);
  }
  store_pieces(static_cast<P*>(job.packed) + (block * job.n_columns + c) * kTokens, values);
}

template <typename T, typename P = T>
cudaError_t pack(const PackColumns& job, cudaStream_t stream) {
  const int64_t blocks = ceil_div(job.x.tokens, kTokens), chunks = ceil_div(job.n_columns, kThreads);
  if (blocks * chunks == 0) return cudaSuccess;
  pack_kernel<T, P>
      <<<static_cast<unsigned>(blocks * chunks), kThreads, 0, stream>>>(job, static_cast<unsigned>(chunks));
  return cudaGetLastError();
}

// Entry by entry -----------------------------------------------------------------------------------------------------

constexpr int kChains = 4;  // sums of a thread that do not wait for each other

template <typename T>
__global__ void __launch_bounds__(kThreads)
    entries_kernel(const __grid_constant__ SampledGrad job, int64_t blocks_of_part) {
  using S = Sum<T>;
  const int64_t e = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (e >= job.plan.n) return;
  const TokenMajor& dy = job.grad_output;
  const int64_t row = job.plan.rows[row_of(job.plan, e)];
  const T* __restrict__ of_row = static_cast<const T*>(dy.data) + row * dy.column_stride;
  const T* __restrict__ packed = static_cast<const T*>(job.packed) + int64_t{job.plan.columns[e]} * kTokens;
  const int64_t first = int64_t{blockIdx.y} * blocks_of_part;
  const int64_t end = min(first + blocks_of_part, ceil_div(dy.tokens, kTokens));
  S sums[kChains] = {};
  for (int64_t block = first; block < end; ++block) {
    T g[kTokens], x[kTokens];
    load_pieces(packed + block * job.n_columns * kTokens, x);
    load_tokens(of_row + block * kTokens * dy.token_stride, dy.token_stride, dy.tokens - block * kTokens, g);
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
      sums[t % kChains] = multiply_add(to_float(g[t]), to_float(x[t]), sums[t % kChains]);
  }
  static_cast<S*>(job.grad)[blockIdx.y * job.plan.n + e] = (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

template <typename T>
cudaError_t entries(const SampledGrad& job, TokenParts parts, cudaStream_t stream) {
  if (job.plan.n == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(job.plan.n, kThreads)), static_cast<unsigned>(parts.count));
  entries_kernel<T><<<grid, kThreads, 0, stream>>>(job, parts.blocks);
  return cudaGetLastError();
}

// Parts --------------------------------------------------------------------------------------------------------------

constexpr int kGroup = 32;  // entries of a thread block
constexpr int kGroups = 8;  // that share the parts of an entry

// Thread (e, k) adds the parts k, k + 8, k + 16 ... of entry e, and then the eight are added in order.
template <typename S>
__global__ void __launch_bounds__(kGroup* kGroups)
    sum_parts_kernel(const S* __restrict__ sums, int64_t parts, int64_t n, S* __restrict__ grad) {
  __shared__ S of_group[kGroups][kGroup];
  const int64_t e = int64_t{blockIdx.x} * kGroup + threadIdx.x;
  S sum = 0;
  if (e < n)
    for (int64_t part = threadIdx.y; part < parts; part += kGroups) sum += sums[part * n + e];
  of_group[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || e >= n) return;
#pragma unroll
  for (int k = 1; k < kGroups; ++k) sum += of_group[k][threadIdx.x];
  grad[e] = sum;
}

template <typename S>
cudaError_t sum_parts(const void* sums, int64_t parts, int64_t n, void* grad, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  sum_parts_kernel<S><<<static_cast<unsigned>(ceil_div(n, kGroup)), dim3(kGroup, kGroups), 0, stream>>>(
      static_cast<const S*>(sums), parts, n, static_cast<S*>(grad));
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_pack(const PackColumns& job, cudaStream_t stream) {
  switch (job.packed_type) {
    case FloatType::bf16:
      return job.x.type == FloatType::bf16 ? pack<BFloat16>(job, stream) : pack<float, BFloat16>(job, stream);
    case FloatType::fp16:
      return job.x.type == FloatType::fp16 ? pack<Half>(job, stream) : pack<float, Half>(job, stream);
    case FloatType::fp64:
      return pack<double>(job, stream);
    default:
      return pack<float>(job, stream);
  }
}

TokenParts parts_of_entries(const SampledGrad& job) {
  return token_parts(job.grad_output.tokens, ceil_div(job.plan.n, 32));
}

cudaError_t launch_entries(const SampledGrad& job, TokenParts parts, cudaStream_t stream) {
  switch (job.grad_output.type) {
    case FloatType::bf16:
      return entries<BFloat16>(job, parts, stream);
    case FloatType::fp16:
      return entries<Half>(job, parts, stream);
    case FloatType::fp64:
      return entries<double>(job, parts, stream);
    default:
      return entries<float>(job, parts, stream);
  }
}

TokenParts token_parts(int64_t tokens, int64_t warps) {
  constexpr int64_t kWarps = 4096;  // about one wave of an H100, half full
  constexpr int64_t kMaxParts = 256;
  constexpr int64_t kMinBlocks = 4;  // so that a part is worth its sums
  const int64_t blocks = ceil_div(tokens, kTokens);
  const int64_t wanted = ceil_div(kWarps, warps > 0 ? warps : 1);
  int64_t count = ceil_div(blocks, kMinBlocks);
  count = count < wanted ? count : wanted;
  count = count < kMaxParts ? count : kMaxParts;
  if (count <= 1) return {1, blocks};
  const int64_t of_part = ceil_div(blocks, count);
  return {ceil_div(blocks, of_part), of_part};
}

cudaError_t launch_sum_parts(FloatType type, const void* sums, int64_t parts, int64_t n, void* grad,
                             cudaStream_t stream) {
  return type == FloatType::fp64 ? sum_parts<double>(sums, parts, n, grad, stream)
                                 : sum_parts<float>(sums, parts, n, grad, stream);
}

}  // namespace saft::cuda
