// Loads, stores and the checks in front of them.  The fast paths are inline; access.cpp has the rest.
#pragma once
#include "machine.h"

namespace ptx {

#pragma GCC visibility push(default)
// `data`: the bytes about to be written, if known; writing what is there already is no race inside a block.
void check_global(Thread& t, uint64_t addr, unsigned n, Access kind, unsigned site, const void* data);
void check_shared(Thread& t, uint64_t addr, unsigned n, Access kind, const void* data);
[[noreturn]] void local_fault(Thread& t, uint64_t addr, unsigned n);
void check_param(Thread& t, uint64_t addr, unsigned n, Access kind);
uint8_t* generic_ptr(Thread& t, uint64_t addr, unsigned n, Access kind, unsigned site, const void* data);

// Records of what orders accesses, for the race detectors.  `device`: the scope is wider than the block.
void thread_fence(Thread& t, bool device);
void thread_release(Thread& t, bool device);
void thread_publish(Thread& t);
void thread_observe(Thread& t, bool device, bool acquires);
#pragma GCC visibility pop

inline bool is_shared_address(const Thread& t, uint64_t addr) {
  return addr - reinterpret_cast<uint64_t>(t.block->shared) < t.block->shared_size;
}

inline bool is_local_address(const Thread& t, uint64_t addr) {
  return addr - t.stack < t.stack_size;
}

inline bool is_param_address(const Thread& t, uint64_t addr) {
  return addr - reinterpret_cast<uint64_t>(t.block->params) < t.block->params_size;
}

[[gnu::always_inline]] inline uint8_t* global_ptr(Thread& t, uint64_t addr, unsigned n, Access kind, unsigned site,
                                                  const void* data = nullptr) {
  const Hot& h = t.block->hot[site % kHot];
  uint64_t off = addr - h.base;
  if ((addr & (n - 1)) || off >= h.size || n > h.size - off) [[unlikely]]
    check_global(t, addr, n, kind, site, data);
  return reinterpret_cast<uint8_t*>(addr);
}

[[gnu::always_inline]] inline uint8_t* shared_ptr(Thread& t, uint64_t addr, unsigned n, Access kind,
                                                  const void* data = nullptr) {
  const Block& b = *t.block;
  addr &= 0xffffffffu;
  if ((addr & (n - 1)) || addr + n > b.shared_size || b.shared_races) [[unlikely]]
    check_shared(t, addr, n, kind, data);
  return b.shared + addr;
}

[[gnu::always_inline]] inline uint8_t* local_ptr(Thread& t, uint64_t addr, unsigned n) {
  addr &= 0xffffffffu;
  if ((addr & (n - 1)) || addr + n > t.stack_size) [[unlikely]]
    local_fault(t, addr, n);
  return reinterpret_cast<uint8_t*>(t.stack + addr);
}

template <Space S>
[[gnu::always_inline]] inline uint8_t* pointer(Thread& t, uint64_t addr, unsigned n, Access kind, unsigned site,
                                               const void* data = nullptr) {
  if constexpr (S == Space::Global) return global_ptr(t, addr, n, kind, site, data);
  if constexpr (S == Space::Shared) return shared_ptr(t, addr, n, kind, data);
  if constexpr (S == Space::Generic) return generic_ptr(t, addr, n, kind, site, data);
  if constexpr (S == Space::Local) return local_ptr(t, addr, n);
  if constexpr (S == Space::Param) check_param(t, addr, n, kind);
  return reinterpret_cast<uint8_t*>(addr);
}

template <class T>
inline T load_as(const uint8_t* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store_as(uint8_t* p, T v) {
  std::memcpy(p, &v, sizeof v);
}

template <Space S, Access K, class T, unsigned N>
inline void store_vector(Thread& t, uint64_t addr, unsigned site, const T (&v)[N]) {
  uint8_t* p = pointer<S>(t, addr, sizeof v, K, site, v);
  if constexpr (is_strong(K)) {
    for (unsigned i = 0; i < N; i++) __atomic_store_n(reinterpret_cast<T*>(p) + i, v[i], __ATOMIC_RELEASE);
  } else {
    std::memcpy(p, v, sizeof v);
  }
}

template <Space S, Access K, class T, unsigned N>
inline void load_vector(Thread& t, uint64_t addr, unsigned site, T (&v)[N]) {
  if constexpr (is_strong(K)) poll(t, 64);
  const uint8_t* p = pointer<S>(t, addr, sizeof v, K, site);
  if constexpr (is_strong(K)) {
    for (unsigned i = 0; i < N; i++) v[i] = __atomic_load_n(reinterpret_cast<const T*>(p) + i, __ATOMIC_ACQUIRE);
  } else {
    std::memcpy(v, p, sizeof v);
  }
}

}  // namespace ptx
