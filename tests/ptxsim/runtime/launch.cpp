// Entry points of the runtime: ptxsim_launch, ptxsim_error.
#include "launch.h"

#include <thread>

#include "scheduler.h"

namespace ptx {

static thread_local std::string error_text;

// Sorted ranges, overlapping ones merged; adjacent ones stay apart.
static void set_ranges(Launch& l) {
  std::vector<HostRange> all(l.args.ranges, l.args.ranges + l.args.n_ranges);
  std::sort(all.begin(), all.end(), [](auto& x, auto& y) { return x.base < y.base; });
  for (auto& r : all) {
    if (!r.size) continue;
    if (!l.ranges.empty() && r.base < l.ranges.back().base + l.ranges.back().size) {
      Range& last = l.ranges.back();
      last.size = std::max(last.size, r.base + r.size - last.base);
      continue;
    }
    l.ranges.push_back({r.base, r.size, nullptr, nullptr});
  }
  for (auto& r : l.ranges) {
    if (l.opt.races) r.blocks = l.shadows.emplace_back(r.size * sizeof(BlockCell)).as<BlockCell>();
    if (l.opt.block_races) r.threads = l.shadows.emplace_back(r.size * sizeof(ThreadCell)).as<ThreadCell>();
  }
}

static void run(const LaunchArgs& args) {
  Launch l{args, args.options, {}, {}, {}, {}};
  const size_t blocks = args.grid.count();
  set_ranges(l);
  l.deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(int64_t(l.opt.timeout_s * 1000));
  l.published.assign(l.opt.races ? blocks : 0, 0);
  BlockOrder order(blocks, l.opt);
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::string error;
  auto worker = [&] {
    try {
      run_blocks(l, order, next, failed, error);
    } catch (const std::exception& e) {  // no memory
      if (!failed.exchange(true)) error = e.what();
    }
  };
  size_t workers = std::clamp<size_t>(l.opt.threads, 1, blocks);
  if (workers > 1 && l.opt.block_races) throw std::runtime_error("block_races knows one block at a time");
  if (workers == 1) {
    worker();
  } else {
    std::vector<std::thread> pool;
    for (size_t i = 0; i < workers; i++) pool.emplace_back(worker);
    for (auto& t : pool) t.join();
  }
  if (failed) throw std::runtime_error(error);
}

}  // namespace ptx

// Zero, or nonzero with a text in ptxsim_error() of the same OS thread.
extern "C" [[gnu::visibility("default")]] int ptxsim_launch(const ptx::LaunchArgs* args) {
  try {
    ptx::run(*args);
    return 0;
  } catch (const std::exception& e) {
    ptx::error_text = e.what();
    return 1;
  }
}

extern "C" [[gnu::visibility("default")]] const char* ptxsim_error() {
  return ptx::error_text.c_str();
}
