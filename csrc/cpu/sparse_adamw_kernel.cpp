// for each selected entry (w, g, m, v):
//   m += (1 - beta1) (g - m)
//   v  = beta2 v + (1 - beta2) g^2
//   w  = w (1 - lr weight_decay) - step_size m / (sqrt(v) / bias_correction2 + eps)
//
// The arithmetic is free; an entry costs the cache lines of w and of a dense g, far apart from the next entry's.
// Entries are therefore handled in blocks: request the lines of the next block, gather this one into small
// arrays, compute on those with vector code, scatter the weights back. m, v and master are read in order.
// Operations are kept in the order of torch's AdamW and unfused, so all instruction sets give the same bits.

#include "sparse_adamw_kernel.h"

#include "numbers.h"

namespace saft::cpu {
namespace {

constexpr int64_t kBlock = 128;

struct Places {
  int64_t param[kBlock];
  int64_t grad[kBlock];
  int64_t n = 0;
};

template <typename T>
void request(const AdamWSegment& s, int64_t begin, int64_t end, Places& places) {
  places.n = end - begin < kBlock ? end - begin : kBlock;
  if (places.n <= 0) return;
  load_places(s.indices, s.param_layout, begin, places.n, places.param);
  const T* param = static_cast<const T*>(s.param);
  for (int64_t i = 0; i < places.n; ++i) __builtin_prefetch(param + places.param[i], 1);
  if (!s.grad) return;
  load_places(s.indices, s.grad_layout, begin, places.n, places.grad);
  const T* grad = static_cast<const T*>(s.grad);
  for (int64_t i = 0; i < places.n; ++i) __builtin_prefetch(grad + places.grad[i], 0);
}

template <typename T>
void gather_block(const T* from, const int64_t* places, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[places[i]]);
}

void update_block(const AdamWSegment& s, const AdamW& h, int64_t n, const float* __restrict grad, float* __restrict w,
                  float* __restrict exp_avg, float* __restrict exp_avg_sq) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = grad[i] * h.inverse_grad_scale * h.sign;
    const float m = exp_avg[i] + h.one_minus_beta1 * (g - exp_avg[i]);
    const float v = exp_avg_sq[i] * h.beta2 + h.one_minus_beta2 * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    w[i] = w[i] * h.keep - s.step_size * m / (__builtin_sqrtf(v) / s.bias_correction2 + h.eps);
  }
}

template <typename T>
void step_block(const AdamWSegment& s, const AdamW& h, int64_t begin, const Places& places) {
  T* param = static_cast<T*>(s.param);
  float gathered_grad[kBlock], gathered_param[kBlock];
  const float* grad = s.grad ? gathered_grad : s.compact_grad + begin;
  float* w = s.master ? s.master + begin : gathered_param;
  if (s.grad) gather_block(static_cast<const T*>(s.grad), places.grad, places.n, gathered_grad);
  if (!s.master) gather_block(param, places.param, places.n, gathered_param);
  update_block(s, h, places.n, grad, w, s.exp_avg + begin, s.exp_avg_sq + begin);
  for (int64_t i = 0; i < places.n; ++i) param[places.param[i]] = from_float<T>(w[i]);
}

template <typename T>
void step_typed(const AdamWSegment& s, const AdamW& h, int64_t begin, int64_t end) {
  Places places[2];
  request<T>(s, begin, end, places[0]);
  for (int current = 0; begin < end; current ^= 1) {
    const int64_t n = places[current].n;
    request<T>(s, begin + n, end, places[current ^ 1]);
    step_block<T>(s, h, begin, places[current]);
    begin += n;
  }
}

void step(const AdamWSegment& s, const AdamW& h, int64_t begin, int64_t end) {
  switch (s.type) {
    case ParamType::fp32:
      return step_typed<float>(s, h, begin, end);
    case ParamType::bf16:
      return step_typed<BFloat16>(s, h, begin, end);
    case ParamType::fp16:
      return step_typed<Half>(s, h, begin, end);
  }
}

}  // namespace

namespace SAFT_CPU_ISA {
extern const SparseAdamWKernels sparse_adamw;
const SparseAdamWKernels sparse_adamw = {step};
}  // namespace SAFT_CPU_ISA

}  // namespace saft::cpu
