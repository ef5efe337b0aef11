// One tile of the product over the used rows and columns: 64 rows of dy times 64 packed columns of x, summed over
// tokens. 16-bit types go through tensor cores (mma m16n8k16, sums in fp32), fp32 and fp64 through fused multiply-adds:
// tf32 would cost the result its precision.
#pragma once

#include <type_traits>

#include "numbers.cuh"

namespace saft::cuda {

constexpr int kTile = 64;
constexpr int kTileThreads = 128;

// Token blocks that are in shared memory at a time, and the tokens of these.
constexpr int kTileBlocks = 2;
constexpr int kTileTokens = kTileBlocks * static_cast<int>(kTokens);

// 16 tokens of a packed column, in pieces of 16 bytes.
template <typename T>
struct alignas(16) Column {
  T at[kTokens];
};

// Behind the tokens of a row lie some unused places, so that what a warp reads at a time lies in different banks: with
// 16-bit types four pairs of tokens of eight rows, else one token of up to 16 columns.
template <typename T>
constexpr int kPitch = kTileTokens + (sizeof(T) == 2 ? 8 : 1);

template <typename T>
using TileOperand = T[kTile][kPitch<T>];

// The products take the place of the operands when all are summed.
template <typename T, typename S>
union alignas(16) TileMemory {
  struct {
    TileOperand<T> rows;     // dy, token by token within a row
    TileOperand<T> columns;  // x
  };
  S products[kTile][kTile + 1];

  __device__ TileMemory() {}
};

// rows[j][t] = dy[t, plan.rows[first + j]], zero where there is no such token or row. Neighbouring threads take
// neighbouring rows, whose elements lie side by side or nearly so.
template <typename T>
__device__ void load_rows(const SampledGrad& job, int64_t first, int64_t block, int64_t end, TileOperand<T>& rows) {
  const TokenMajor& dy = job.grad_output;
  const int j = static_cast<int>(threadIdx.x) % kTile;
  const bool exists = first + j < job.plan.n_rows;
  const T* from = static_cast<const T*>(dy.data);
  if (exists) from += job.plan.rows[first + j] * dy.column_stride;
  const int64_t last = min(end * kTokens, dy.tokens);
#pragma unroll 4
  for (int t = static_cast<int>(threadIdx.x) / kTile; t < kTileTokens; t += kTileThreads / kTile) {
    const int64_t token = block * kTokens + t;
    rows[j][t] = exists && token < last ? from[token * dy.token_stride] : from_float<T>(0);
  }
}

// columns[c][t] = x[t, column first + c], zero where there is no such column or block. Padding was packed as zeros.
template <typename T>
__device__ void load_columns(const SampledGrad& job, int64_t first, int64_t block, int64_t end,
                             TileOperand<T>& columns) {
  constexpr int kPieces = kTile * kTileBlocks;
  const auto* packed = static_cast<const Column<T>*>(job.packed);
  for (int piece = static_cast<int>(threadIdx.x); piece < kPieces; piece += kTileThreads) {
    const int c = piece % kTile, b = piece / kTile;
    const bool exists = first + c < job.n_columns && block + b < end;
    const Column<T> x = exists ? packed[(block + b) * job.n_columns + first + c] : Column<T>{};
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<Column<T>*>(&columns[c][b * kTokens]) = x;
    } else {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) columns[c][b * kTokens + t] = x.at[t];
    }
  }
}

// What a thread holds of the tile's sums: for fp32 and fp64 a block of 8 rows and 4 columns.
template <typename T, typename S>
class TileSums {
 public:
  __device__ void add_products(const TileMemory<T, S>& memory) {
#pragma unroll 1
    for (int t = 0; t < kTileTokens; ++t) {
      S row[kRows], column[kColumns];
#pragma unroll
      for (int j = 0; j < kRows; ++j) row[j] = to_float(memory.rows[first_row() + j][t]);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) column[c] = to_float(memory.columns[first_column() + c * kStride][t]);
#pragma unroll
      for (int j = 0; j < kRows; ++j)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sums_[j][c] = fma(row[j], column[c], sums_[j][c]);
    }
  }

  __device__ void store(S (&products)[kTile][kTile + 1]) const {
#pragma unroll
    for (int j = 0; j < kRows; ++j)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) products[first_row() + j][first_column() + c * kStride] = sums_[j][c];
  }

 private:
  static constexpr int kRows = 8, kColumns = 4, kStride = kTile / kColumns;

  __device__ static int first_row() { return static_cast<int>(threadIdx.x) / kStride * kRows; }
  __device__ static int first_column() { return static_cast<int>(threadIdx.x) % kStride; }

  S sums_[kRows][kColumns] = {};
};

// d += a b for a [16 rows, 16 tokens] and b [16 tokens, 8 columns]. Lane l holds, with g = l / 4 and p = 2 (l % 4):
// a: rows g and g + 8 at tokens p, p + 1 and p + 8, p + 9; b: column g at the same tokens; d: rows g and g + 8 at
// columns p and p + 1 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type").
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// For 16-bit types: a warp holds 16 rows and all columns.
template <typename T>
class TensorCoreSums {
 public:
  __device__ void add_products(const TileMemory<T, float>& memory) {
#pragma unroll
    for (int k = 0; k < kTileTokens; k += 16) {
      const uint32_t a[4] = {pair(memory.rows[first_row()], k), pair(memory.rows[first_row() + 8], k),
                             pair(memory.rows[first_row()], k + 8), pair(memory.rows[first_row() + 8], k + 8)};
#pragma unroll
      for (int c = 0; c < kTile / 8; ++c) {
        const T* column = memory.columns[8 * c + lane() / 4];
        const uint32_t b[2] = {pair(column, k), pair(column, k + 8)};
        mma(sums_[c], a, b, T{});
      }
    }
  }

  __device__ void store(float (&products)[kTile][kTile + 1]) const {
#pragma unroll
    for (int c = 0; c < kTile / 8; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) products[first_row() + i / 2 * 8][8 * c + lane() % 4 * 2 + i % 2] = sums_[c][i];
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int first_row() { return static_cast<int>(threadIdx.x) / 32 * 16 + lane() / 4; }

  // The lane's two tokens behind token k.
  __device__ static uint32_t pair(const T* tokens, int k) {
    return *reinterpret_cast<const uint32_t*>(tokens + k + lane() % 4 * 2);
  }

  float sums_[kTile / 8][4] = {};
};

template <>
class TileSums<BFloat16, float> : public TensorCoreSums<BFloat16> {};
template <>
class TileSums<Half, float> : public TensorCoreSums<Half> {};

}  // namespace saft::cuda
