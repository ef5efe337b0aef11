// Sums over tokens: their types, the tokens that a thread loads at a time, the row of an entry.
#pragma once

#include <cstdint>

#include "../ops/jobs.h"
#include "numbers.cuh"

namespace saft::cuda {

// The type in which products of T are summed.
template <typename T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <typename T>
using Sum = typename SumOf<T>::type;

__device__ inline float multiply_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
__device__ inline double multiply_add(double a, double b, double c) {
  return __fma_rn(a, b, c);
}

// 16 bytes as one load.
template <typename T>
struct alignas(16) Piece {
  static constexpr int kLength = 16 / sizeof(T);
  T at[kLength];
};

// `count` numbers that lie side by side, on a boundary of 16 bytes.
template <int count, typename T>
__device__ inline void load_pieces(const T* __restrict__ from, T (&to)[count]) {
  static_assert(count % Piece<T>::kLength == 0);
#pragma unroll
  for (int i = 0; i < count; i += Piece<T>::kLength) {
    const Piece<T> piece = *reinterpret_cast<const Piece<T>*>(from + i);
#pragma unroll
    for (int k = 0; k < Piece<T>::kLength; ++k) to[i + k] = piece.at[k];
  }
}

template <int count, typename T>
__device__ inline void store_pieces(T* __restrict__ to, const T (&from)[count]) {
  static_assert(count % Piece<T>::kLength == 0);
#pragma unroll
  for (int i = 0; i < count; i += Piece<T>::kLength) {
    Piece<T> piece;
#pragma unroll
    for (int k = 0; k < Piece<T>::kLength; ++k) piece.at[k] = from[i + k];
    *reinterpret_cast<Piece<T>*>(to + i) = piece;
  }
}

// `count` tokens of a column of a matrix, zeros behind the `left` that exist. Neighbouring lanes take neighbouring
// columns, so that a token's loads are coalesced where the matrix is token-major; where tokens lie side by side, as in
// convolutions, a lane's tokens are loaded as pieces.
template <int count, typename T>
__device__ inline void load_tokens(const T* __restrict__ column, int64_t token_stride, int64_t left, T (&to)[count]) {
  if (token_stride == 1 && left >= count && reinterpret_cast<uintptr_t>(column) % alignof(Piece<T>) == 0) {
    load_pieces<count>(column, to);
    return;
  }
#pragma unroll
  for (int t = 0; t < count; ++t) to[t] = t < left ? column[t * token_stride] : from_float<T>(0.0f);
}

// The first place in a sorted vector whose value is not below `value`.
template <typename T, typename V>
__device__ inline int64_t lower_bound(const T* __restrict__ sorted, int64_t n, V value) {
  int64_t first = 0;
  while (n > 0) {
    const int64_t half = n / 2;
    const bool below = sorted[first + half] < value;
    first = below ? first + half + 1 : first;
    n = below ? n - half - 1 : half;
  }
  return first;
}

// The row of a plan that holds entry e. Neighbouring threads search along the same path, through the L1 cache.
__device__ inline int64_t row_of(const RowPlan& plan, int64_t e) {
  return lower_bound(plan.offsets + 1, plan.n_rows, e + 1);
}

}  // namespace saft::cuda
