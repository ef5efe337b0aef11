// for each selected entry (o, i):   grad[o, i] = sum over t of dy[t, o] * x[t, i]
//
// A few tokens at a time, so that their rows of dy and their packed columns of x stay in the cache while all entries
// pass by: an element of dy is loaded once for all entries of its row, 16 tokens of a packed column are one load.
// Each entry sums in 16 lanes, and the lanes are added at the end.

#include "sampled_grad_kernel.h"

#include "numbers.h"
#include "simd.h"

namespace saft::cpu {
namespace {

template <typename T>
struct Sum {
  using type = float;
};
template <>
struct Sum<double> {
  using type = double;
};

// Packing ------------------------------------------------------------------------------------------------------------

// As it is, or an fp32 number rounded.
template <typename P, typename T>
inline P packed_as(T x) {
  if constexpr (sizeof(P) == sizeof(T))
    return x;
  else
    return from_float<P>(x);
}

template <typename P, typename T>
void pack_column(const T* x, int64_t token_stride, int64_t tokens, P* __restrict out) {
  if (tokens == kTokens) {
    for (int64_t t = 0; t < kTokens; ++t) out[t] = packed_as<P>(x[t * token_stride]);
    return;
  }
  for (int64_t t = 0; t < kTokens; ++t) out[t] = t < tokens ? packed_as<P>(x[t * token_stride]) : P{};
}

template <typename T>
void pack_ones(int64_t tokens, T* out) {
  for (int64_t t = 0; t < kTokens; ++t) out[t] = t < tokens ? from_float<T>(1.0f) : T{};
}

template <typename T, typename P = T>
void pack_typed(const PackColumns& job, int64_t begin, int64_t end) {
  const TokenMajor& x = job.x;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kTokens;
    const int64_t tokens = x.tokens - first < kTokens ? x.tokens - first : kTokens;
    const T* from = static_cast<const T*>(x.data) + first * x.token_stride;
    P* to = static_cast<P*>(job.packed) + block * job.n_columns * kTokens;
    for (int64_t c = 0; c < job.n_columns; ++c, to += kTokens) {
      const int64_t column = job.columns[c];
      if (column == x.width)
        pack_ones(tokens, to);
      else
        pack_column(from + column * x.column_stride, x.token_stride, tokens, to);
    }
  }
}

// The gradient -------------------------------------------------------------------------------------------------------

// kTokens numbers as one value: the compiler keeps them in as few registers as the instruction set has room for.
template <typename S>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float type __attribute__((vector_size(kTokens * sizeof(float))));
};
template <>
struct Lanes<double> {
  typedef double type __attribute__((vector_size(kTokens * sizeof(double))));
};

template <typename V, typename T>
inline V load_lanes(const T* x) {
  V lanes;
  if constexpr (sizeof(V) == kTokens * sizeof(T)) {
    __builtin_memcpy(&lanes, x, sizeof(V));
  } else {
    for (int64_t t = 0; t < kTokens; ++t) lanes[t] = to_float(x[t]);
  }
  return lanes;
}

// bf16 is the upper half of fp32.
template <>
inline Lanes<float>::type load_lanes<Lanes<float>::type, BFloat16>(const BFloat16* x) {
  typedef uint16_t Halves __attribute__((vector_size(kTokens * sizeof(uint16_t))));
  typedef uint32_t Words __attribute__((vector_size(kTokens * sizeof(uint32_t))));
  Halves halves;
  __builtin_memcpy(&halves, x, sizeof(halves));
  return reinterpret_cast<Lanes<float>::type>(__builtin_convertvector(halves, Words) << 16);
}

inline void load_tokens(const float* dy, int64_t token_stride, float* out) {
  load_strided(dy, token_stride, out);
}
inline void load_tokens(const double* dy, int64_t token_stride, double* out) {
  for (int64_t t = 0; t < kTokens; ++t) out[t] = dy[t * token_stride];
}
template <typename T>
inline void load_tokens(const T* dy, int64_t token_stride, T* out) {
  load_strided(&dy->bits, token_stride, &out->bits);
}

// dy at the block's tokens; zero behind the last, where x is packed as zero too.
template <typename V, typename T>
inline V load_row(const T* dy, int64_t token_stride, int64_t tokens) {
  static_assert(kTokens == kLanes);
  T values[kTokens];
  if (tokens >= kTokens)
    load_tokens(dy, token_stride, values);
  else
    for (int64_t t = 0; t < kTokens; ++t) values[t] = t < tokens ? dy[t * token_stride] : T{};
  return load_lanes<V>(values);
}

// sums += dy * x for `blocks` blocks of tokens from `block` on, over the entries of rows [begin, end).
template <typename T, typename S, int blocks>
void add_blocks(const SampledGrad& job, int64_t begin, int64_t end, int64_t block, S* sums) {
  using V = typename Lanes<S>::type;
  const TokenMajor& dy = job.grad_output;
  const T* first = static_cast<const T*>(dy.data) + block * kTokens * dy.token_stride;
  const T* packed = static_cast<const T*>(job.packed) + block * job.n_columns * kTokens;
  const int64_t left = dy.tokens - block * kTokens;
  for (int64_t row = begin; row < end; ++row) {
    V g[blocks];
    for (int b = 0; b < blocks; ++b)
      g[b] = load_row<V>(first + b * kTokens * dy.token_stride + job.plan.rows[row] * dy.column_stride, dy.token_stride,
                         left - b * kTokens);
    for (int64_t e = job.plan.offsets[row]; e < job.plan.offsets[row + 1]; ++e, sums += kTokens) {
      V sum = load_lanes<V>(sums);
      for (int b = 0; b < blocks; ++b)
        sum += g[b] * load_lanes<V>(packed + (b * job.n_columns + job.plan.columns[e]) * kTokens);
      __builtin_memcpy(sums, &sum, sizeof(sum));
    }
  }
}

template <typename S>
S sum_lanes(S* lanes) {
  for (int64_t half = kTokens / 2; half > 0; half /= 2)
    for (int64_t t = 0; t < half; ++t) lanes[t] += lanes[t + half];
  return lanes[0];
}

template <typename T>
void grad_typed(const SampledGrad& job, int64_t begin, int64_t end, void* scratch) {
  using S = typename Sum<T>::type;
  constexpr int kBlocks = 2;  // at a time, which pays where sums are loaded more often than rows of dy
  S* sums = static_cast<S*>(scratch);
  S* grad = static_cast<S*>(job.grad) + job.plan.offsets[begin];
  const int64_t n = job.plan.offsets[end] - job.plan.offsets[begin];
  for (int64_t i = 0; i < n * kTokens; ++i) sums[i] = 0;
  const int64_t all = (job.grad_output.tokens + kTokens - 1) / kTokens;
  int64_t block = 0;
  if (n >= 4 * (end - begin))
    for (; block + kBlocks <= all; block += kBlocks) add_blocks<T, S, kBlocks>(job, begin, end, block, sums);
  for (; block < all; ++block) add_blocks<T, S, 1>(job, begin, end, block, sums);
  for (int64_t e = 0; e < n; ++e) grad[e] = sum_lanes(sums + e * kTokens);
}

void pack(const PackColumns& job, int64_t begin, int64_t end) {
  switch (job.packed_type) {
    case FloatType::bf16:
      return job.x.type == FloatType::bf16 ? pack_typed<BFloat16>(job, begin, end)
                                           : pack_typed<float, BFloat16>(job, begin, end);
    case FloatType::fp16:
      return job.x.type == FloatType::fp16 ? pack_typed<Half>(job, begin, end)
                                           : pack_typed<float, Half>(job, begin, end);
    case FloatType::fp64:
      return pack_typed<double>(job, begin, end);
    default:
      return pack_typed<float>(job, begin, end);
  }
}

void grad(const SampledGrad& job, int64_t begin, int64_t end, void* sums) {
  switch (job.grad_output.type) {
    case FloatType::bf16:
      return grad_typed<BFloat16>(job, begin, end, sums);
    case FloatType::fp16:
      return grad_typed<Half>(job, begin, end, sums);
    case FloatType::fp64:
      return grad_typed<double>(job, begin, end, sums);
    default:
      return grad_typed<float>(job, begin, end, sums);
  }
}

}  // namespace

namespace SAFT_CPU_ISA {
extern const SampledGradKernels sampled_grad;
const SampledGradKernels sampled_grad = {pack, grad};
}  // namespace SAFT_CPU_ISA

}  // namespace saft::cpu
