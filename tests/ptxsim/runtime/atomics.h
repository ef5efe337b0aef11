// Atomic read-modify-write on host memory (real atomics: blocks may run on several OS threads).
#pragma once
#include "math.h"
#include "memory.h"

namespace ptx {

template <class T>
using RawOf = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

// Replaces *p by f(*p), returns the old raw bits.
template <class T, class F>
inline RawOf<T> rmw(uint8_t* p, F f) {
  using U = RawOf<T>;
  U* u = reinterpret_cast<U*>(p);
  U old = __atomic_load_n(u, __ATOMIC_RELAXED), now;
  do {
    now = std::bit_cast<U>(T(f(std::bit_cast<T>(old))));
  } while (!__atomic_compare_exchange_n(u, &old, now, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
  return old;
}

// Atomics on f16 / bf16 elements packed in W (one or two per word).
template <class W, class F>
inline W rmw_packed(uint8_t* p, W v, F f) {
  return rmw<W>(p, [&](W old) {
    W now = f(uint16_t(old), uint16_t(v));
    if constexpr (sizeof(W) == 4) now |= W(f(uint16_t(old >> 16), uint16_t(v >> 16))) << 16;
    return now;
  });
}

}  // namespace ptx
