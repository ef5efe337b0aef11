// The machine as the runtime itself sees it: launches, blocks in flight, fibers, shadow memory.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdio>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "machine.h"

namespace ptx {

using Kernel = void (*)(const uint8_t* params, Thread& t);

// Launch options; field order is mirrored by launch._Options (ctypes).
struct Options {
  uint32_t order;  // 0 forward, 1 reverse, 2 random
  uint32_t threads;
  uint64_t seed;
  double timeout_s;
  uint32_t bounds, races, shared_races, block_races, allow_exited;
};

struct HostRange {
  uint64_t base, size;
};

// Mirrored by launch._Launch (ctypes).
struct LaunchArgs {
  Kernel kernel;
  const uint8_t* params;
  uint64_t params_size;
  uint8_t* globals;
  Dim3 grid, block;
  uint32_t static_shared, dynamic_shared;
  uint64_t local_bytes;  // estimate of what the kernel needs on the stack
  uint64_t n_ranges;
  const HostRange* ranges;
  Options options;
};

// Memory that reads as zero and is backed page by page when touched.
class Pages {
 public:
  Pages() = default;
  explicit Pages(size_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
    madvise(data_, bytes, MADV_HUGEPAGE);  // faults cost more than the checks
  }
  Pages(Pages&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Pages& operator=(Pages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Pages() {
    if (bytes_) munmap(data_, bytes_);
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

struct BlockCell;   // races.h
struct ThreadCell;  // races.h

// One allowed range of global memory, with the shadows of the race detectors that are on.
struct Range {
  uint64_t base, size;
  BlockCell* blocks;
  ThreadCell* threads;
};

// State shared by all blocks of a launch.
struct Launch {
  const LaunchArgs& args;
  const Options& opt;
  std::vector<Range> ranges;  // sorted by base
  std::vector<Pages> shadows;
  std::vector<uint32_t> published;  // per block: the time up to which others may know what it has done
  std::chrono::steady_clock::time_point deadline;
};

// A cp.async copy that has been issued but not waited for.
struct AsyncCopy {
  uint64_t dst, src;
  uint32_t size, src_size;
};

enum class State : uint8_t { Fresh, Ready, AtBarrier, InCollective, Done };

struct ThreadState : Thread {
  State state = State::Fresh;
  bool barrier_aligned = false;
  bool released = false, acquired = false;  // executed a release, an acquire
  unsigned barrier_id = 0, barrier_site = 0, barrier_result = 0;
  uint32_t polls = 0;
  Fiber* fiber = nullptr;
  const char* waiting_for = "";
  std::vector<AsyncCopy> copies;
  std::vector<size_t> copy_groups;  // end index in `copies` of every committed group
};

// `slots[lane]` is what a lane passed to collective(); called once per collective, by the last lane.
using CollectiveFn = void (*)(void** slots, uint32_t mask);

struct Warp {
  uint32_t wait_mask[32];  // nonzero: the lane waits in a collective over that mask
  CollectiveFn fn[32];
  unsigned tag[32];  // the operation, where one function serves several
  void* slot[32];
  uint32_t epoch = 0;  // number of bar.warp.sync so far
};

struct Barrier {
  unsigned arrived = 0;
  unsigned expected = 0;  // 0: all threads of the block
  unsigned sum = 0;       // predicates of bar.red
};

struct FreeDeleter {
  void operator()(uint8_t* p) const { std::free(p); }
};

struct BlockState : Block {
  explicit BlockState(Launch& l);
  ~BlockState();

  Launch& launch;
  unsigned linear = 0;
  std::vector<ThreadState> threads;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::vector<unsigned> order;
  size_t cursor = 0;      // place in `order` of the running thread
  uint32_t epoch = 1;     // never reset: number of barriers released so far
  unsigned alive = 0;     // threads that have not exited
  uint32_t time = 1;      // advances with every device-scope fence or release
  uint32_t fenced = 0;    // the time before the last of them
  bool observed = false;  // a strong read of something that another block may have written
  bool acquired = false;  // after which there was a fence, or which was an acquire
  std::string error;
  Fiber main;
  std::vector<Fiber*> free_fibers;
  size_t fibers = 0;  // how many there are, in use or free
  size_t stack_size = 0;
  const Range* recent[kHot] = {};
  std::unique_ptr<uint8_t, FreeDeleter> shared_memory;
  Pages shared_shadow;
};

inline ThreadState& state_of(Thread& t) {
  return static_cast<ThreadState&>(t);
}
inline BlockState& block_of(const Thread& t) {
  return static_cast<BlockState&>(*t.block);
}

void suspend(ThreadState& t, State state, const char* what);  // scheduler.cpp
void release_barrier(BlockState& b, unsigned id);             // collectives.cpp

// "block (x,y,z) thread (x,y,z)", for error messages.
std::string place(const Thread& t);
[[noreturn]] void fail(const Thread& t, const std::string& what);

}  // namespace ptx
