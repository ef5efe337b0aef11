// The order of blocks, and what runs them.
#pragma once
#include <atomic>
#include <numeric>

#include "races.h"

namespace ptx {

struct BlockOrder {  // a permutation of the block indices
  uint64_t n, mul = 1, add = 0;
  bool reverse;

  BlockOrder(uint64_t count, const Options& opt) : n(count), reverse(opt.order == 1) {
    if (opt.order != 2) return;
    add = opt.seed % n;
    mul = (opt.seed * 2654435761u + 12345) % n | 1;
    while (std::gcd(mul, n) != 1) mul += 2;
  }
  uint64_t operator()(uint64_t i) const {
    return reverse ? n - 1 - i : uint64_t((static_cast<unsigned __int128>(i) * mul + add) % n);
  }
};

// Runs the next block until there is none, or one has failed; called by every OS thread of a launch.
void run_blocks(Launch& l, const BlockOrder& order, std::atomic<size_t>& next, std::atomic<bool>& failed,
                std::string& error);

}  // namespace ptx
