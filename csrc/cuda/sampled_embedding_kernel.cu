// grad[e] = sum over t with tokens[t] = row of e of dy[t, column of e]
//
// The tokens come sorted by row, so that those of an entry are a range, found by search; most rows of a plan have none
// in a batch. A warp sums one entry, its lanes over the tokens. For T tokens and m pairs of an entry and a token of its
// row: 12 T bytes in and out of the sort, a sector of dy (32 bytes) and 8 bytes for each pair. Nothing of this is what
// takes the time: for 16 texts of 77 tokens and n = 25,296 an H200 took 72 us, of which 0.7 us would do for the bytes
// (docs/gpu.md). It is launches and waiting, the sort's above all.

#include "sampled_grad_kernel.h"
#include "sums.cuh"

namespace saft::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

__global__ void __launch_bounds__(kThreads)
    find_rows_kernel(const int64_t* __restrict__ tokens, int64_t n, const int32_t* __restrict__ rows, int64_t n_rows,
                     int32_t* __restrict__ found) {
  const int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t >= n) return;
  const int64_t token = tokens[t], row = lower_bound(rows, n_rows, token);
  found[t] = static_cast<int32_t>(row < n_rows && rows[row] == token ? row : n_rows);
}

template <typename S>
__device__ inline S sum_of_warp(S sum) {
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_xor_sync(~0u, sum, half);
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_tokens_kernel(const __grid_constant__ SampledEmbeddingGrad job, const __grid_constant__ SortedTokens sorted) {
  using S = Sum<T>;
  const int64_t e = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (e >= job.plan.n) return;
  const int lane = threadIdx.x % kWarp;
  const TokenMajor& dy = job.grad_output;
  const int64_t row = row_of(job.plan, e);
  const int64_t first = lower_bound(sorted.rows, dy.tokens, row);
  const int64_t end = first + lower_bound(sorted.rows + first, dy.tokens - first, row + 1);
  const T* __restrict__ column = static_cast<const T*>(dy.data) + job.plan.columns[e] * dy.column_stride;
  S sum = 0;
#pragma unroll 4
  for (int64_t i = first + lane; i < end; i += kWarp)
    sum += static_cast<S>(to_float(column[sorted.tokens[i] * dy.token_stride]));
  sum = sum_of_warp(sum);
  if (lane == 0) static_cast<S*>(job.grad)[e] = sum;
}

template <typename T>
cudaError_t sum_tokens(const SampledEmbeddingGrad& job, SortedTokens sorted, cudaStream_t stream) {
  if (job.plan.n == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(ceil_div(job.plan.n, kThreads / kWarp));
  sum_tokens_kernel<T><<<blocks, kThreads, 0, stream>>>(job, sorted);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_find_rows(const SampledEmbeddingGrad& job, int32_t* found, cudaStream_t stream) {
  const int64_t n = job.grad_output.tokens;
  if (n == 0) return cudaSuccess;
  find_rows_kernel<<<static_cast<unsigned>(ceil_div(n, kThreads)), kThreads, 0, stream>>>(job.tokens, n, job.plan.rows,
                                                                                          job.plan.n_rows, found);
  return cudaGetLastError();
}

cudaError_t launch_sum_tokens(const SampledEmbeddingGrad& job, SortedTokens sorted, cudaStream_t stream) {
  switch (job.grad_output.type) {
    case FloatType::bf16:
      return sum_tokens<BFloat16>(job, sorted, stream);
    case FloatType::fp16:
      return sum_tokens<Half>(job, sorted, stream);
    case FloatType::fp64:
      return sum_tokens<double>(job, sorted, stream);
    default:
      return sum_tokens<float>(job, sorted, stream);
  }
}

}  // namespace saft::cuda
