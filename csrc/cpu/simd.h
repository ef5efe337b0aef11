// The one vector operation that compilers do not find by themselves; everything else in the kernels is plain loops
// that they vectorise for each instruction set.
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

}  // namespace
}  // namespace saft::cpu
