// for each selected entry e = (o, i):   grad[e] = sum over t of dy[t, o] * x[t, i]
//
// Two ways, of which the plan decides (saft_kernels/cost_model.py has the model, in seconds per token):
//
// entries: a thread per entry. Entries are sorted by row, so the 32 of a warp read a short piece of dy[t, :] for every
// token, a few sectors of 32 bytes; of x each reads the 16 tokens of its packed column, whole sectors of its own. An
// entry thus costs about b + 4 bytes of L2 traffic per token of b bytes, and hardly any arithmetic. A 3072 x 768 layer
// at 0.1% (2,359 entries, uniform) in bf16 with 128 x 197 tokens reads 155 MB of dy and 39 MB of x through HBM, 58 us
// at 3.35 TB/s, and moves 357 MB out of L2.
//
// product: if entries share rows and columns, the dense product over those alone, in tiles of 64 rows and 64 columns,
// on tensor cores for 16-bit types: 128 b bytes per tile and token, however many entries a tile has. Of each tile only
// the entries are written.
//
// Tokens are split into parts whose sums are added in order afterwards: a layer has few entries, a GPU many threads.
//
// A transposition of the needed rows of dy beforehand would make every entry a product of two contiguous vectors, but
// reads and writes those rows once more (2 b bytes per row and token), while the pieces that warps read are contiguous
// enough already.

#include "numbers.cuh"
#include "sampled_grad_kernel.h"
#include "tile_product.cuh"

namespace saft::cuda {
namespace {

constexpr int kThreads = 128;

// Products are summed in fp32, in fp64 for fp64.
template <typename T>
using Sum = decltype(to_float(T{}));

constexpr int64_t kWarps = 4096;       // that keep a GPU busy: about as many as an H100 holds
constexpr int64_t kBlocksPerPart = 8;  // token blocks, at least: fewer are not worth a sum of their own

// Mirrored in saft_kernels/cost_model.py: the number of entries per tile from which the product is the faster way.
constexpr int64_t kCrowdedTile16 = 64;   // 16-bit types, on tensor cores
constexpr int64_t kCrowdedTile32 = 128;  // fp32 and fp64

// Packing ------------------------------------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackColumns job, int64_t items) {
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item >= items) return;
  const int64_t first = item / job.n_columns * kTokens;
  const int64_t column = job.columns[item % job.n_columns];
  const TokenMajor& x = job.x;
  const int tokens = static_cast<int>(min(x.tokens - first, kTokens));
  const bool ones = column == x.width;
  const T* from = static_cast<const T*>(x.data) + first * x.token_stride + column * x.column_stride;
  Column<T> out;
#pragma unroll
  for (int t = 0; t < kTokens; ++t)
    out.at[t] = t >= tokens ? from_float<T>(0) : ones ? from_float<T>(1) : from[t * x.token_stride];
  static_cast<Column<T>*>(job.packed)[item] = out;
}

template <typename T>
cudaError_t launch_pack(const PackColumns& job, cudaStream_t stream) {
  const int64_t items = ceil_div(job.x.tokens, kTokens) * job.n_columns;
  if (items == 0) return cudaSuccess;
  pack_kernel<T><<<static_cast<unsigned>(ceil_div(items, kThreads)), kThreads, 0, stream>>>(job, items);
  return cudaGetLastError();
}

// The parts of the tokens --------------------------------------------------------------------------------------------

// Blocks of tokens that belong to a part.
struct Range {
  int64_t begin;
  int64_t end;
};

__device__ Range blocks_of_part(int64_t tokens, int part, int parts) {
  const int64_t blocks = ceil_div(tokens, kTokens);
  return {blocks * part / parts, blocks * (part + 1) / parts};
}

template <typename S>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const S* __restrict__ partial, S* __restrict__ grad, int64_t n, int parts) {
  const int64_t e = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (e >= n) return;
  S sum = partial[e];
  for (int part = 1; part < parts; ++part) sum += partial[part * n + e];
  grad[e] = sum;
}

// Entry by entry -----------------------------------------------------------------------------------------------------

// The number of the row that holds entry e: the last whose first entry is not behind it.
__device__ int64_t row_of(const RowPlan& plan, int64_t e) {
  int64_t low = 0, high = plan.n_rows;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (plan.offsets[middle] <= e)
      low = middle;
    else
      high = middle;
  }
  return low;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) entries_kernel(const __grid_constant__ SampledGrad job, Sum<T>* out) {
  const int64_t e = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (e >= job.plan.n) return;
  const TokenMajor& dy = job.grad_output;
  const auto* packed = static_cast<const Column<T>*>(job.packed) + job.plan.columns[e];
  const T* row = static_cast<const T*>(dy.data) + job.plan.rows[row_of(job.plan, e)] * dy.column_stride;
  const Range part = blocks_of_part(dy.tokens, static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y));
  Sum<T> sums[4] = {};  // so that a product need not wait for the sum before it
  for (int64_t block = part.begin; block < part.end; ++block) {
    const Column<T> x = packed[block * job.n_columns];
    const T* from = row + block * kTokens * dy.token_stride;
    const int64_t left = dy.tokens - block * kTokens;
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
      if (t < left) sums[t % 4] = fma(to_float(from[t * dy.token_stride]), to_float(x.at[t]), sums[t % 4]);
  }
  out[blockIdx.y * job.plan.n + e] = (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

template <typename T>
void launch_entries(const SampledGrad& job, int parts, void* out, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(job.plan.n, kThreads)), parts);
  entries_kernel<T><<<grid, kThreads, 0, stream>>>(job, static_cast<Sum<T>*>(out));
}

// As a product -------------------------------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kTileThreads) product_kernel(const __grid_constant__ SampledGrad job, Sum<T>* out) {
  __shared__ TileMemory<T, Sum<T>> memory;
  const int64_t first_row = int64_t{blockIdx.y} * kTile, first_column = int64_t{blockIdx.x} * kTile;
  const Range part = blocks_of_part(job.grad_output.tokens, static_cast<int>(blockIdx.z), static_cast<int>(gridDim.z));
  TileSums<T, Sum<T>> sums;
  for (int64_t block = part.begin; block < part.end; block += kTileBlocks) {
    load_rows(job, first_row, block, part.end, memory.rows);
    load_columns(job, first_column, block, part.end, memory.columns);
    __syncthreads();
    sums.add_products(memory);
    __syncthreads();
  }
  sums.store(memory.products);
  __syncthreads();

  // A warp per row writes those of its entries that lie in the tile.
  const int64_t last_row = min(first_row + kTile, job.plan.n_rows);
  for (int64_t j = first_row + threadIdx.x / 32; j < last_row; j += kTileThreads / 32) {
    for (int64_t e = job.plan.offsets[j] + threadIdx.x % 32; e < job.plan.offsets[j + 1]; e += 32) {
      const int64_t column = job.plan.columns[e] - first_column;
      if (column >= 0 && column < kTile) out[blockIdx.z * job.plan.n + e] = memory.products[j - first_row][column];
    }
  }
}

int64_t tiles_of(const SampledGrad& job) {
  return ceil_div(job.plan.n_rows, kTile) * ceil_div(job.n_columns, kTile);
}

template <typename T>
void launch_product(const SampledGrad& job, int parts, void* out, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(job.n_columns, kTile)),
                  static_cast<unsigned>(ceil_div(job.plan.n_rows, kTile)), parts);
  product_kernel<T><<<grid, kTileThreads, 0, stream>>>(job, static_cast<Sum<T>*>(out));
}

// Both ---------------------------------------------------------------------------------------------------------------

template <typename T>
cudaError_t launch_grad(const SampledGrad& job, SampledStrategy strategy, void* partial, cudaStream_t stream) {
  const int64_t n = job.plan.n;
  if (n == 0) return cudaSuccess;
  void* const out = strategy.parts > 1 ? partial : job.grad;
  if (strategy.product)
    launch_product<T>(job, strategy.parts, out, stream);
  else
    launch_entries<T>(job, strategy.parts, out, stream);
  if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess || strategy.parts == 1) return status;
  add_parts_kernel<<<static_cast<unsigned>(ceil_div(n, kThreads)), kThreads, 0, stream>>>(
      static_cast<const Sum<T>*>(partial), static_cast<Sum<T>*>(job.grad), n, strategy.parts);
  return cudaGetLastError();
}

// Embeddings ---------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    find_rows_kernel(const __grid_constant__ SampledEmbeddingGrad job, int32_t* __restrict__ found) {
  const int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t >= job.grad_output.tokens) return;
  const int64_t token = job.tokens[t];
  int64_t low = 0, high = job.plan.n_rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (job.plan.rows[middle] < token)
      low = middle + 1;
    else
      high = middle;
  }
  const bool has_row = low < job.plan.n_rows && job.plan.rows[low] == token;
  found[t] = static_cast<int32_t>(has_row ? low : job.plan.n_rows);
}

// The first place at which sorted[place] >= row.
__device__ int64_t lower_bound(const int32_t* sorted, int64_t n, int64_t row) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sorted[middle] < row)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// A warp per entry: lanes take the row's tokens in turns, and their sums are added pairwise.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(const __grid_constant__ SampledEmbeddingGrad job, const int32_t* __restrict__ found,
                     const int64_t* __restrict__ order, Sum<T>* __restrict__ grad) {
  const int64_t e = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  if (e >= job.plan.n) return;
  const TokenMajor& dy = job.grad_output;
  const int64_t row = row_of(job.plan, e);
  const T* column = static_cast<const T*>(dy.data) + job.plan.columns[e] * dy.column_stride;
  const int64_t end = lower_bound(found, dy.tokens, row + 1);
  Sum<T> sum = 0;
  for (int64_t i = lower_bound(found, dy.tokens, row) + threadIdx.x % 32; i < end; i += 32)
    sum += to_float(column[order[i] * dy.token_stride]);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(~0u, sum, distance);
  if (threadIdx.x % 32 == 0) grad[e] = sum;
}

template <typename T>
cudaError_t launch_embedding(const SampledEmbeddingGrad& job, const int32_t* found, const int64_t* order,
                             cudaStream_t stream) {
  if (job.plan.n == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(ceil_div(job.plan.n * 32, kThreads));
  embedding_kernel<T><<<blocks, kThreads, 0, stream>>>(job, found, order, static_cast<Sum<T>*>(job.grad));
  return cudaGetLastError();
}

}  // namespace

SampledStrategy strategy_of(const SampledGrad& job) {
  const FloatType type = job.grad_output.type;
  const bool narrow = type == FloatType::bf16 || type == FloatType::fp16;
  const bool product = job.plan.n >= tiles_of(job) * (narrow ? kCrowdedTile16 : kCrowdedTile32) && job.plan.n > 0;
  const int64_t warps = product ? tiles_of(job) * (kTileThreads / 32) : ceil_div(job.plan.n, 32);
  const int64_t most = job.grad_output.tokens / (kTokens * kBlocksPerPart);
  const int64_t parts = warps == 0 || most < 1 ? 1 : kWarps / warps < most ? kWarps / warps : most;
  return {product, static_cast<int>(parts < 1 ? 1 : parts)};
}

cudaError_t launch_pack_columns(const PackColumns& job, cudaStream_t stream) {
  switch (job.x.type) {
    case FloatType::bf16:
      return launch_pack<BFloat16>(job, stream);
    case FloatType::fp16:
      return launch_pack<Half>(job, stream);
    case FloatType::fp64:
      return launch_pack<double>(job, stream);
    default:
      return launch_pack<float>(job, stream);
  }
}

cudaError_t launch_sampled_grad(const SampledGrad& job, SampledStrategy strategy, void* partial, cudaStream_t stream) {
  switch (job.grad_output.type) {
    case FloatType::bf16:
      return launch_grad<BFloat16>(job, strategy, partial, stream);
    case FloatType::fp16:
      return launch_grad<Half>(job, strategy, partial, stream);
    case FloatType::fp64:
      return launch_grad<double>(job, strategy, partial, stream);
    default:
      return launch_grad<float>(job, strategy, partial, stream);
  }
}

cudaError_t launch_find_rows(const SampledEmbeddingGrad& job, int32_t* found, cudaStream_t stream) {
  if (job.grad_output.tokens == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(ceil_div(job.grad_output.tokens, kThreads));
  find_rows_kernel<<<blocks, kThreads, 0, stream>>>(job, found);
  return cudaGetLastError();
}

cudaError_t launch_sampled_embedding_grad(const SampledEmbeddingGrad& job, const int32_t* found, const int64_t* order,
                                          cudaStream_t stream) {
  switch (job.grad_output.type) {
    case FloatType::bf16:
      return launch_embedding<BFloat16>(job, found, order, stream);
    case FloatType::fp16:
      return launch_embedding<Half>(job, found, order, stream);
    case FloatType::fp64:
      return launch_embedding<double>(job, found, order, stream);
    default:
      return launch_embedding<float>(job, found, order, stream);
  }
}

}  // namespace saft::cuda
