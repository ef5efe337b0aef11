// The vector operations that compilers do not find by themselves: two keep some elements and close the gaps, one takes
// elements that lie apart; everything else in the kernels is plain loops that they vectorise for each instruction set.
//
// In an unnamed namespace on purpose: see isa.h on linkage.
#pragma once

#include <cstdint>

#ifdef SAFT_X86_64
#include <immintrin.h>
#endif

namespace saft::cpu {
namespace {

constexpr int kLanes = 16;

// For each i in [0, kLanes) without |x[i]| < bound (so also for NaN): *out++ = first + i. Returns how many.
// `out` must have room for kLanes entries, whatever is returned.
inline int64_t append_not_below(const float* x, float bound, int32_t first, int32_t* out) {
#if defined(__AVX512F__)
  // Without a branch: survivors come at random, and a mispredicted branch costs more than all of this.
  const __m512 v = _mm512_abs_ps(_mm512_loadu_ps(x));
  const __mmask16 mask = _mm512_cmp_ps_mask(v, _mm512_set1_ps(bound), _CMP_NLT_UQ);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(first), lane);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, index));
  return __builtin_popcount(mask);
#else
  uint32_t mask = 0;
#if defined(__AVX2__)
  const __m256 sign = _mm256_set1_ps(-0.0f), limit = _mm256_set1_ps(bound);
  for (int i = 0; i < kLanes; i += 8) {
    const __m256 v = _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i));
    mask |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, limit, _CMP_NLT_UQ))) << i;
  }
#elif defined(__SSE2__)
  const __m128 sign = _mm_set1_ps(-0.0f), limit = _mm_set1_ps(bound);
  for (int i = 0; i < kLanes; i += 4) {
    const __m128 v = _mm_andnot_ps(sign, _mm_loadu_ps(x + i));
    mask |= static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpnlt_ps(v, limit))) << i;
  }
#else
  for (int i = 0; i < kLanes; ++i) mask |= uint32_t{!(__builtin_fabsf(x[i]) < bound)} << i;
#endif
  int64_t found = 0;
  for (; mask; mask &= mask - 1) out[found++] = first + __builtin_ctz(mask);
  return found;
#endif
}

// Keeps the pairs (value, position) with bits of value > bits, or equal bits and position <= tie, in order and in
// place; values are not negative. Returns how many.
inline int64_t keep_above(float* values, int64_t* positions, int64_t n, uint32_t bits, int64_t tie) {
  int64_t kept = 0, i = 0;
#if defined(__AVX512F__) && defined(__AVX512VL__)
  const __m256i bound = _mm256_set1_epi32(static_cast<int>(bits));
  const __m512i last = _mm512_set1_epi64(tie);
  for (; i + 8 <= n; i += 8) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
    const __m512i p = _mm512_loadu_si512(positions + i);
    const __mmask8 above = _mm256_cmpgt_epi32_mask(v, bound);
    const __mmask8 tied = _mm256_cmpeq_epi32_mask(v, bound) & _mm512_cmple_epi64_mask(p, last);
    const __mmask8 mask = above | tied;
    // Whole vectors are stored: what lies behind the kept ones has been read already.
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + kept), _mm256_maskz_compress_epi32(mask, v));
    _mm512_storeu_si512(positions + kept, _mm512_maskz_compress_epi64(mask, p));
    kept += __builtin_popcount(mask);
  }
#endif
  // Without a branch: it could not be predicted, as about half of the pairs go.
  for (; i < n; ++i) {
    const float value = values[i];
    const int64_t position = positions[i];
    values[kept] = value;
    positions[kept] = position;
    const auto own = __builtin_bit_cast(uint32_t, value);
    kept += (own > bits) | ((own == bits) & (position <= tie));
  }
  return kept;
}

// out[i] = x[i * stride] for i in [0, kLanes).
//
// Compilers store element by element, so that the wide load that follows waits for the last of these stores; here they
// meet in registers. A gather instruction was no faster for fp32, and of 16-bit numbers it would read one too many.
inline void load_strided(const float* x, int64_t stride, float* out) {
#if defined(__AVX2__)
  __m128 quarters[4];
  for (int i = 0; i < 4; ++i, x += 4 * stride) {
    __m128 four = _mm_load_ss(x);
    four = _mm_insert_ps(four, _mm_load_ss(x + stride), 0x10);
    four = _mm_insert_ps(four, _mm_load_ss(x + 2 * stride), 0x20);
    quarters[i] = _mm_insert_ps(four, _mm_load_ss(x + 3 * stride), 0x30);
  }
  const __m256 low = _mm256_set_m128(quarters[1], quarters[0]), high = _mm256_set_m128(quarters[3], quarters[2]);
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  _mm512_storeu_ps(out, _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1));
#else
  _mm256_storeu_ps(out, low);
  _mm256_storeu_ps(out + 8, high);
#endif
#else
  for (int i = 0; i < kLanes; ++i) out[i] = x[i * stride];
#endif
}

inline void load_strided(const uint16_t* x, int64_t stride, uint16_t* out) {
#if defined(__AVX2__)
  const uint16_t* y = x + 8 * stride;
  __m128i low = _mm_setzero_si128(), high = low;
  low = _mm_insert_epi16(low, x[0], 0), high = _mm_insert_epi16(high, y[0], 0);
  low = _mm_insert_epi16(low, x[stride], 1), high = _mm_insert_epi16(high, y[stride], 1);
  low = _mm_insert_epi16(low, x[2 * stride], 2), high = _mm_insert_epi16(high, y[2 * stride], 2);
  low = _mm_insert_epi16(low, x[3 * stride], 3), high = _mm_insert_epi16(high, y[3 * stride], 3);
  low = _mm_insert_epi16(low, x[4 * stride], 4), high = _mm_insert_epi16(high, y[4 * stride], 4);
  low = _mm_insert_epi16(low, x[5 * stride], 5), high = _mm_insert_epi16(high, y[5 * stride], 5);
  low = _mm_insert_epi16(low, x[6 * stride], 6), high = _mm_insert_epi16(high, y[6 * stride], 6);
  low = _mm_insert_epi16(low, x[7 * stride], 7), high = _mm_insert_epi16(high, y[7 * stride], 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_set_m128i(high, low));
#else
  for (int i = 0; i < kLanes; ++i) out[i] = x[i * stride];
#endif
}

}  // namespace
}  // namespace saft::cpu
