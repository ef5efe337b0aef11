// Wide loads and stores: a thread's consecutive entries of a vector as pieces of 16 bytes where the vector allows it.
#pragma once

#include <cstdint>

namespace saft::cuda {

// Consecutive entries that a thread takes: 16 bytes of fp32 state or of int32 indices.
constexpr int kEntries = 4;

// How many of a thread's entries exist.
__device__ inline int entries_from(int64_t first, int64_t n) {
  return n - first < kEntries ? static_cast<int>(n - first) : kEntries;
}

template <typename T>
struct alignas(sizeof(T) * kEntries < 16 ? sizeof(T) * kEntries : 16) Entries {
  T at[kEntries];
};

// Slices of a vector may begin anywhere; whole vectors of torch are aligned, and then this is the same for all threads.
template <typename T>
__device__ inline bool is_wide(const T* vector, int64_t first, int count) {
  return count == kEntries && reinterpret_cast<uintptr_t>(vector + first) % alignof(Entries<T>) == 0;
}

template <typename T>
__device__ inline void load_entries(const T* __restrict__ vector, int64_t first, int count, T (&entries)[kEntries]) {
  if (is_wide(vector, first, count)) {
    const Entries<T> loaded = *reinterpret_cast<const Entries<T>*>(vector + first);
#pragma unroll
    for (int i = 0; i < kEntries; ++i) entries[i] = loaded.at[i];
  } else {
#pragma unroll
    for (int i = 0; i < kEntries; ++i) entries[i] = i < count ? vector[first + i] : T{};
  }
}

template <typename T>
__device__ inline void store_entries(T* __restrict__ vector, int64_t first, int count, const T (&entries)[kEntries]) {
  if (is_wide(vector, first, count)) {
    Entries<T> stored;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) stored.at[i] = entries[i];
    *reinterpret_cast<Entries<T>*>(vector + first) = stored;
  } else {
#pragma unroll
    for (int i = 0; i < kEntries; ++i)
      if (i < count) vector[first + i] = entries[i];
  }
}

}  // namespace saft::cuda
