// A parallel loop for work that is not spread evenly.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace saft::cpu {

constexpr int64_t kEntriesAtOnce = 2048;  // fewer entries than this cost less than a second thread does

// f(begin, end) for pieces of [0, entries) that threads take as they become free. Selected entries that share a cache
// line cost less than those that lie alone, and lie together in the tensor: equal shares would not be equal work.
template <typename F>
void parallel_for_entries(int64_t entries, const F& f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, entries, kEntriesAtOnce, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(kEntriesAtOnce, std::memory_order_relaxed)) < entries;)
      f(begin, std::min(begin + kEntriesAtOnce, entries));
  });
}

}  // namespace saft::cpu
