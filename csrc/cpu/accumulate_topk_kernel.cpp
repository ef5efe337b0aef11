// for i in [begin, end):
//   acc[i] += scale * grad[i]          both roundings kept: the same bits on every instruction set
//   if !(|acc[i]| < threshold): emit i
//
// Moves 12 bytes per fp32 element (read acc and grad, write acc), so it must keep pace with memory: the arithmetic is
// vectorised by the compiler, and survivors, few and at random places, are picked out by simd.h.

#include "accumulate_topk_kernel.h"

#include "numbers.h"
#include "simd.h"

namespace saft::cpu {
namespace {

static_assert(kSurvivorSlack >= kLanes);

struct NoGrad {};

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

template <typename T, bool square>
int64_t scan_typed(const Scan& scan, int64_t begin, int64_t end, float threshold, int32_t* __restrict survivors) {
  const T* __restrict grad = static_cast<const T*>(scan.grad) + begin;
  float* __restrict acc = scan.acc + begin;
  const auto n = static_cast<int32_t>(end - begin);
  int64_t found = 0;
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    if constexpr (!__is_same(T, NoGrad))
      for (int32_t j = i; j < i + kLanes; ++j) acc[j] = accumulate<T, square>(acc[j], grad, j, scan.scale);
    found += append_not_below(acc + i, threshold, i, survivors + found);
  }
  for (; i < n; ++i) {
    acc[i] = accumulate<T, square>(acc[i], grad, i, scan.scale);
    if (!(__builtin_fabsf(acc[i]) < threshold)) survivors[found++] = i;
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
    case GradType::fp32:
      return scan_squared<float>(scan, begin, end, threshold, survivors);
    case GradType::bf16:
      return scan_squared<BFloat16>(scan, begin, end, threshold, survivors);
    case GradType::fp16:
      return scan_squared<Half>(scan, begin, end, threshold, survivors);
    default:
      return scan_typed<NoGrad, false>(scan, begin, end, threshold, survivors);
  }
}

}  // namespace

namespace SAFT_CPU_ISA {
extern const AccumulateTopkKernels accumulate_topk;
const AccumulateTopkKernels accumulate_topk = {scan};
}  // namespace SAFT_CPU_ISA

}  // namespace saft::cpu
