// for each selected entry (w, g, m, v):
//   m  = lerp(m, g, 1 - beta1)
//   v  = beta2 v + (1 - beta2) g^2
//   w  = w (1 - lr weight_decay) - step_size m / (sqrt(v) / bias_correction2 + eps)
//
// The arithmetic is free; an entry costs the cache lines of w and of a dense g, far apart from the next entry's.
// Entries are therefore handled in blocks: gather into small arrays (all loads of a block are independent, so the CPU
// has as many in flight as it can, and in an order that its page-table walks can overlap), compute on those with
// vector code, scatter the weights back. m, v and master are read in order. Operations are kept in the order of torch's
// AdamW and unfused, so all instruction sets give the same bits.

#include "sparse_adamw_kernel.h"

#include "numbers.h"
#include "strided.h"

namespace saft::cpu {
namespace {

constexpr int64_t kBlock = 256;

template <typename T>
void gather_block(const T* from, const int64_t* places, int64_t n, float* to) {
  in_page_order(n, [=](int64_t i) { to[i] = to_float(from[places[i]]); });
}

// As torch: starts from the end that is nearer, so that beta1 = 0 gives g itself.
inline float lerp(float m, float g, const AdamW& h) {
  return h.one_minus_beta1 < 0.5f ? m + h.one_minus_beta1 * (g - m) : g - (g - m) * h.beta1;
}

void update_block(const AdamWSegment& s, const AdamW& h, int64_t n, const float* __restrict grad, float* __restrict w,
                  float* __restrict exp_avg, float* __restrict exp_avg_sq) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = grad[i] * h.inverse_grad_scale * h.sign;
    const float m = lerp(exp_avg[i], g, h);
    const float v = exp_avg_sq[i] * h.beta2 + h.one_minus_beta2 * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    w[i] = w[i] * h.keep - s.step_size * m / (__builtin_sqrtf(v) / s.bias_correction2 + h.eps);
  }
}

template <typename T>
void step_typed(const AdamWSegment& s, const AdamW& h, int64_t begin, int64_t end) {
  const AdamWTensor& tensor = s.tensor;
  const AdamWVectors& entries = s.entries;
  T* param = static_cast<T*>(tensor.param);
  int64_t places[kBlock], grad_places[kBlock];
  float gathered_grad[kBlock], gathered_param[kBlock];
  for (; begin < end; begin += kBlock) {
    const int64_t n = end - begin < kBlock ? end - begin : kBlock;
    const float* grad = tensor.grad ? gathered_grad : entries.grad + begin;
    float* w = entries.master ? entries.master + begin : gathered_param;
    load_places(entries.indices, tensor.param_layout, begin, n, places);
    if (entries.master)  // w is written without having been read
      in_page_order(n, [=](int64_t i) { __builtin_prefetch(param + places[i], 1); });
    else
      gather_block(param, places, n, gathered_param);
    if (tensor.grad) {
      load_places(entries.indices, tensor.grad_layout, begin, n, grad_places);
      gather_block(static_cast<const T*>(tensor.grad), grad_places, n, gathered_grad);
    }
    update_block(s, h, n, grad, w, entries.exp_avg + begin, entries.exp_avg_sq + begin);
    for (int64_t i = 0; i < n; ++i) param[places[i]] = from_float<T>(w[i]);
  }
}

void step(const AdamWSegment& s, const AdamW& h, int64_t begin, int64_t end) {
  switch (h.type) {
    case FloatType::bf16:
      return step_typed<BFloat16>(s, h, begin, end);
    case FloatType::fp16:
      return step_typed<Half>(s, h, begin, end);
    default:
      return step_typed<float>(s, h, begin, end);
  }
}

}  // namespace

namespace SAFT_CPU_ISA {
extern const SparseAdamWKernels sparse_adamw;
const SparseAdamWKernels sparse_adamw = {step};
}  // namespace SAFT_CPU_ISA

}  // namespace saft::cpu
