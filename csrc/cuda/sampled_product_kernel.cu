// P[j, c] = sum over t of dy[t, rows[j]] * x[t, c],   grad[e] = P[row of e, column of e]
//
// Where entries share rows and columns, tile by tile: 64 used rows by 64 packed columns, on tensor cores for bf16 and
// fp16. P is never in memory: a tile's entries are picked from it in shared memory, and tiles without entries end at
// once. Per tile and 16 tokens: 64 x 16 numbers of dy and as many of x, from L2 (4 KB in bf16, 1 KB per warp), and
// 65,536 multiply-adds. The memory's bytes are those of the sum entry by entry (sampled_grad_kernel.cu). Measured on an
// H200: 2.2 TB/s of operands, in fp32 and in bf16, which makes 35 and 72 TFLOP/s: in bf16 a tenth of what torch's dense
// product reaches. It pays where tiles are full and few (docs/gpu.md). saft_kernels/cost_model.py chooses.
//
// The sum over 16 tokens may take them in any order as long as both factors take the same. A lane of the tensor core's
// operands has tokens 2q, 2q + 1, 2q + 8 and 2q + 9 of 16 (q = lane % 4); here it brings tokens 4q to 4q + 3 in their
// place: one load of 8 bytes, from packed columns as they lie in memory.

#include "sampled_grad_kernel.h"
#include "sums.cuh"

namespace saft::cuda {
namespace {

constexpr int kTile = 64;      // rows and columns
constexpr int kThreads = 128;  // 4 warps
constexpr int kWarp = 32;
constexpr int kHalf = kTokens / 2;  // tokens of a row, or of a column, that a thread loads
static_assert(kThreads == 2 * kTile);

// Which tile and which tokens a thread block has.
struct Place {
  int64_t first_row, first_column;  // of the plan, of the packed columns
  int64_t first_block, end_block;
};

__device__ inline Place place_of_block(const SampledGrad& job, int64_t blocks_of_part) {
  const auto columns = static_cast<unsigned>(ceil_div(job.n_columns, kTile));
  const int64_t first = int64_t{blockIdx.y} * blocks_of_part;
  return {int64_t{blockIdx.x / columns} * kTile, int64_t{blockIdx.x % columns} * kTile, first,
          min(first + blocks_of_part, ceil_div(job.grad_output.tokens, kTokens))};
}

// 8 tokens of one of the tile's rows of dy: thread i has row i % 64 and half i / 64 of the tokens.
template <typename T>
__device__ inline void load_row(const SampledGrad& job, const Place& place, int64_t block, T (&g)[kHalf]) {
  const TokenMajor& dy = job.grad_output;
  const int64_t j = place.first_row + threadIdx.x % kTile;
  const int64_t first = block * kTokens + threadIdx.x / kTile * kHalf;
  const bool exists = j < job.plan.n_rows;
  const int64_t row = exists ? job.plan.rows[j] : 0;
  load_tokens(static_cast<const T*>(dy.data) + first * dy.token_stride + row * dy.column_stride, dy.token_stride,
              exists ? dy.tokens - first : 0, g);
}

// Tensor cores -------------------------------------------------------------------------------------------------------

// Four tokens of a row or column, as the operands of a multiplication hold them.
struct alignas(8) Quad {
  uint32_t low, high;
};

// sums += A B for 16 rows, 8 columns, 16 tokens. a[0], a[1]: of rows lane / 4 and lane / 4 + 8; b: of column lane / 4;
// sums: rows lane / 4 and lane / 4 + 8, columns 2q and 2q + 1 each.
template <typename T>
__device__ void multiply(const Quad (&a)[2], const Quad& b, float (&sums)[4]);

template <>
__device__ inline void multiply<BFloat16>(const Quad (&a)[2], const Quad& b, float (&sums)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0].low), "r"(a[1].low), "r"(a[0].high), "r"(a[1].high), "r"(b.low), "r"(b.high));
}

template <>
__device__ inline void multiply<Half>(const Quad (&a)[2], const Quad& b, float (&sums)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0].low), "r"(a[1].low), "r"(a[0].high), "r"(a[1].high), "r"(b.low), "r"(b.high));
}

// A warp has 32 rows and 32 columns of the tile: 2 x 4 multiplications per 16 tokens. Rows of dy go through shared
// memory, which transposes them; columns of x come from memory as the operands want them.
template <typename T>
class TensorCoreTile {
 public:
  using Number = float;
  static constexpr int kPitch = kTile + 8;  // of the results: 4 rows of a store share no bank

  union Shared {
    T rows[2][kTile][kTokens];
    float results[kTile][kPitch];
  };

  __device__ void load(const SampledGrad& job, const Place& place, int64_t block) {
    load_row(job, place, block, row_);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const int64_t c = place.first_column + column_of(k) + lane() / 4;
      const T* from = static_cast<const T*>(job.packed) + (block * job.n_columns + c) * kTokens + lane() % 4 * 4;
      next_[k] = c < job.n_columns ? *reinterpret_cast<const Quad*>(from) : Quad{0, 0};
    }
  }

  __device__ void stage(Shared& shared, int buffer) {
    store_pieces(&shared.rows[buffer][threadIdx.x % kTile][threadIdx.x / kTile * kHalf], row_);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) column_[k] = next_[k];
  }

  __device__ void add(const Shared& shared, int buffer) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Quad a[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        a[i] = *reinterpret_cast<const Quad*>(&shared.rows[buffer][row_of(r) + lane() / 4 + 8 * i][lane() % 4 * 4]);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) multiply<T>(a, column_[k], sums_[r][k]);
    }
  }

  __device__ void store(Shared& shared) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int k = 0; k < kColumns; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          shared.results[row_of(r) + lane() / 4 + i / 2 * 8][column_of(k) + lane() % 4 * 2 + i % 2] = sums_[r][k][i];
  }

 private:
  static constexpr int kRows = 2;     // of 16
  static constexpr int kColumns = 4;  // of 8

  __device__ static int lane() { return threadIdx.x % kWarp; }
  __device__ static int row_of(int r) { return threadIdx.x / kWarp / 2 * 32 + r * 16; }
  __device__ static int column_of(int k) { return threadIdx.x / kWarp % 2 * 32 + k * 8; }

  T row_[kHalf];
  Quad next_[kColumns], column_[kColumns];
  float sums_[kRows][kColumns][4] = {};
};

// Plain arithmetic ---------------------------------------------------------------------------------------------------

// fp32 and fp64, in which tensor cores would round the factors or are few. A thread has 8 rows and 4 columns.
template <typename T>
class PlainTile {
 public:
  using Number = T;

  union Shared {
    struct {
      T rows[kTokens][kTile], columns[kTokens][kTile];
    } factors[2];
    T results[kTile][kTile];
  };

  __device__ void load(const SampledGrad& job, const Place& place, int64_t block) {
    load_row(job, place, block, row_);
    const int64_t c = place.first_column + threadIdx.x % kTile;
    const T* from = static_cast<const T*>(job.packed) + (block * job.n_columns + c) * kTokens + half() * kHalf;
    if (c < job.n_columns) {
      load_pieces(from, column_);
    } else {
#pragma unroll
      for (int t = 0; t < kHalf; ++t) column_[t] = 0;
    }
  }

  __device__ void stage(Shared& shared, int buffer) {
#pragma unroll
    for (int t = 0; t < kHalf; ++t) {
      shared.factors[buffer].rows[half() * kHalf + t][threadIdx.x % kTile] = row_[t];
      shared.factors[buffer].columns[half() * kHalf + t][threadIdx.x % kTile] = column_[t];
    }
  }

  __device__ void add(const Shared& shared, int buffer) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      T g[kRows], x[kColumns];
      load_pieces(&shared.factors[buffer].rows[t][first_row()], g);
      load_pieces(&shared.factors[buffer].columns[t][first_column()], x);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int k = 0; k < kColumns; ++k) sums_[r][k] = multiply_add(g[r], x[k], sums_[r][k]);
    }
  }

  __device__ void store(Shared& shared) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) store_pieces(&shared.results[first_row() + r][first_column()], sums_[r]);
  }

 private:
  static constexpr int kRows = 8;
  static constexpr int kColumns = 4;

  __device__ static int half() { return threadIdx.x / kTile; }
  __device__ static int first_row() { return threadIdx.x / 16 * kRows; }
  __device__ static int first_column() { return threadIdx.x % 16 * kColumns; }

  T row_[kHalf], column_[kHalf];
  T sums_[kRows][kColumns] = {};
};

template <typename T>
struct TileOf {
  using type = TensorCoreTile<T>;
};
template <>
struct TileOf<float> {
  using type = PlainTile<float>;
};
template <>
struct TileOf<double> {
  using type = PlainTile<double>;
};

// The kernel ---------------------------------------------------------------------------------------------------------

// The entries of rows [first, first + 64) of the plan, or of those that exist.
struct EntryRange {
  int64_t begin, end;
};

__device__ inline EntryRange entries_of(const RowPlan& plan, int64_t first_row) {
  return {plan.offsets[first_row], plan.offsets[min(first_row + kTile, plan.n_rows)]};
}

// Whether the tile has an entry; the same for all threads.
__device__ inline bool has_entries(const RowPlan& plan, const Place& place) {
  const EntryRange range = entries_of(plan, place.first_row);
  bool found = false;
  for (int64_t e = range.begin + threadIdx.x; e < range.end && !found; e += kThreads) {
    const int64_t column = plan.columns[e] - place.first_column;
    found = column >= 0 && column < kTile;
  }
  return __syncthreads_or(found);
}

// A warp per row.
template <typename Shared, typename S>
__device__ inline void pick_entries(const RowPlan& plan, const Place& place, const Shared& shared,
                                    S* __restrict__ sums) {
  const int64_t rows = min(int64_t{kTile}, plan.n_rows - place.first_row);
  for (int64_t r = threadIdx.x / kWarp; r < rows; r += kThreads / kWarp) {
    const int64_t end = plan.offsets[place.first_row + r + 1];
    for (int64_t e = plan.offsets[place.first_row + r] + threadIdx.x % kWarp; e < end; e += kWarp) {
      const int64_t column = plan.columns[e] - place.first_column;
      if (column >= 0 && column < kTile) sums[e] = shared.results[r][column];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    product_kernel(const __grid_constant__ SampledGrad job, int64_t blocks_of_part) {
  using Tile = typename TileOf<T>::type;
  __shared__ alignas(16) typename Tile::Shared shared;
  const Place place = place_of_block(job, blocks_of_part);
  if (!has_entries(job.plan, place)) return;
  Tile tile;
  if (place.first_block < place.end_block) tile.load(job, place, place.first_block);
  int buffer = 0;
  for (int64_t block = place.first_block; block < place.end_block; ++block, buffer ^= 1) {
    tile.stage(shared, buffer);
    __syncthreads();  // one per step: the other buffer was last read before the one before
    if (block + 1 < place.end_block) tile.load(job, place, block + 1);
    tile.add(shared, buffer);
  }
  __syncthreads();  // the results take the place of the factors
  tile.store(shared);
  __syncthreads();
  pick_entries(job.plan, place, shared, static_cast<typename Tile::Number*>(job.grad) + blockIdx.y * job.plan.n);
}

int64_t tiles_of(const SampledGrad& job) {
  return ceil_div(job.plan.n_rows, kTile) * ceil_div(job.n_columns, kTile);
}

template <typename T>
cudaError_t product(const SampledGrad& job, TokenParts parts, cudaStream_t stream) {
  if (job.plan.n == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(tiles_of(job)), static_cast<unsigned>(parts.count));
  product_kernel<T><<<grid, kThreads, 0, stream>>>(job, parts.blocks);
  return cudaGetLastError();
}

}  // namespace

TokenParts parts_of_product(const SampledGrad& job) {
  return token_parts(job.grad_output.tokens, tiles_of(job) * (kThreads / kWarp));
}

cudaError_t launch_product(const SampledGrad& job, TokenParts parts, cudaStream_t stream) {
  switch (job.grad_output.type) {
    case FloatType::bf16:
      return product<BFloat16>(job, parts, stream);
    case FloatType::fp16:
      return product<Half>(job, parts, stream);
    case FloatType::fp64:
      return product<double>(job, parts, stream);
    default:
      return product<float>(job, parts, stream);
  }
}

}  // namespace saft::cuda
