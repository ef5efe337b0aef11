// From a flat index in logical row-major order to the element's place in memory.
//
// In an unnamed namespace on purpose: see isa.h on linkage.
#pragma once

#include <cstdint>

#include "../ops/jobs.h"

namespace saft::cpu {

namespace {

// f(i) for all i in [0, n): every eighth, then their neighbours. Sorted entries that lie far apart have a page each,
// and eight neighbouring pages share a cache line of the page table: taken in sequence, all page-table walks that a CPU
// runs at a time would wait for one line; taken in this order they wait for lines of their own.
template <typename F>
inline void in_page_order(int64_t n, const F& f) {
  constexpr int64_t kPages = 8;
  for (int64_t first = 0; first < kPages; ++first)
    for (int64_t i = first; i < n; i += kPages) f(i);
}

inline int64_t place_of(const Strided& layout, int64_t index) {
  int64_t place = 0;
  for (int d = layout.dims - 1; d >= 0; --d) {
    place += index % layout.sizes[d] * layout.strides[d];
    index /= layout.sizes[d];
  }
  return place;
}

// places[i] = memory offset, in elements, of entry first + i.
inline void load_places(const Indices& indices, const Strided& layout, int64_t first, int64_t n, int64_t* places) {
  if (indices.wide) {
    const int64_t* index = static_cast<const int64_t*>(indices.data) + first;
    for (int64_t i = 0; i < n; ++i) places[i] = index[i];
  } else {
    const int32_t* index = static_cast<const int32_t*>(indices.data) + first;
    for (int64_t i = 0; i < n; ++i) places[i] = index[i];
  }
  if (layout.dims == 0) return;
  for (int64_t i = 0; i < n; ++i) places[i] = place_of(layout, places[i]);
}

}  // namespace
}  // namespace saft::cpu
