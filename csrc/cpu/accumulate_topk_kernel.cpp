// for i in [begin, end):
//   acc[i] += scale * grad[i]          both roundings kept: the same bits on every instruction set
//   if !(|acc[i]| < threshold): emit i
//
// Moves 12 bytes per fp32 element (read acc and grad, write acc), so it must keep pace with memory: a block is
// processed by straight-line vector code that only asks "does any survive?". Survivors are one in a thousand once
// the threshold has risen, and only their blocks are looked at again.

#include "accumulate_topk_kernel.h"

#include "numbers.h"
#include "simd.h"

namespace saft::cpu {
namespace {

constexpr int32_t kBlock = 64;

// How far ahead memory is asked for, in elements. The CPU prefetches by itself, but stops at the end of every page.
constexpr int64_t kAhead = 512;

struct NoGrad {};

// The cache lines that the block kAhead elements behind `block` lies in; past the end of a tensor that is no error.
template <bool write, typename T>
inline void request_ahead(const T* block) {
  const auto* line = reinterpret_cast<const char*>(block) + kAhead * sizeof(T);
  for (size_t i = 0; i < kBlock * sizeof(T); i += 64) __builtin_prefetch(line + i, write);
}

template <typename T, bool square>
inline float accumulate(float acc, const T* grad, int64_t i, float scale) {
  if constexpr (__is_same(T, NoGrad)) {
    return acc;
  } else {
    float g = to_float(grad[i]);
    if constexpr (square) g *= g;
    return acc + g * scale;
  }
}

// Updates acc[0, n) and says whether any element survives.
template <typename T, bool square>
inline bool update(float* __restrict acc, const T* __restrict grad, int64_t n, float scale, float threshold) {
  int32_t any = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float a = accumulate<T, square>(acc[i], grad, i, scale);
    if constexpr (!__is_same(T, NoGrad)) acc[i] = a;
    any |= !(__builtin_fabsf(a) < threshold);
  }
  return any != 0;
}

// Whole vectors are stored at out + found, where found <= i: they end where the elements do.
int64_t append_survivors(const float* acc, int32_t n, float threshold, int32_t first, int32_t* out) {
  int64_t found = 0;
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) found += append_not_below(acc + i, threshold, first + i, out + found);
  for (; i < n; ++i)
    if (!(__builtin_fabsf(acc[i]) < threshold)) out[found++] = first + i;
  return found;
}

template <typename T, bool square>
int64_t scan_typed(const Scan& scan, int64_t begin, int64_t end, float threshold, int32_t* survivors) {
  const T* grad = static_cast<const T*>(scan.grad) + begin;
  float* acc = scan.acc + begin;
  const float scale = scan.scale;
  const auto n = static_cast<int32_t>(end - begin);
  int64_t found = 0;
  for (int32_t b = 0; b < n; b += kBlock) {
    const int32_t size = n - b < kBlock ? n - b : kBlock;
    request_ahead<!__is_same(T, NoGrad)>(acc + b);
    if constexpr (!__is_same(T, NoGrad)) request_ahead<false>(grad + b);
    // A constant trip count lets the compiler unroll the whole block.
    const bool any = size == kBlock ? update<T, square>(acc + b, grad + b, kBlock, scale, threshold)
                                    : update<T, square>(acc + b, grad + b, size, scale, threshold);
    if (any) found += append_survivors(acc + b, size, threshold, b, survivors + found);
  }
  return found;
}

template <typename T>
int64_t scan_squared(const Scan& scan, int64_t begin, int64_t end, float threshold, int32_t* survivors) {
  return scan.square ? scan_typed<T, true>(scan, begin, end, threshold, survivors)
                     : scan_typed<T, false>(scan, begin, end, threshold, survivors);
}

int64_t scan(const Scan& scan, int64_t begin, int64_t end, float threshold, int32_t* survivors) {
  switch (scan.type) {
    case FloatType::fp32:
      return scan_squared<float>(scan, begin, end, threshold, survivors);
    case FloatType::bf16:
      return scan_squared<BFloat16>(scan, begin, end, threshold, survivors);
    case FloatType::fp16:
      return scan_squared<Half>(scan, begin, end, threshold, survivors);
    default:
      return scan_typed<NoGrad, false>(scan, begin, end, threshold, survivors);
  }
}

}  // namespace

namespace SAFT_CPU_ISA {
extern const AccumulateTopkKernels accumulate_topk;
const AccumulateTopkKernels accumulate_topk = {scan, keep_above};
}  // namespace SAFT_CPU_ISA

}  // namespace saft::cpu
