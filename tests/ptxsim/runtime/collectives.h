// How lanes of a warp meet.
#pragma once
#include "launch.h"

namespace ptx {

// Waits for all lanes of `mask`; the last one calls `fn` on the slots of all.  Lanes meet if they name the same mask,
// function and tag, wherever they stand in the program.
void collective(Thread& t, uint32_t mask, CollectiveFn fn, unsigned tag, void* slot, const char* what);

template <class F>
void for_lanes(uint32_t mask, F f) {
  for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
}

}  // namespace ptx
