#include "races.h"

#include <atomic>

#include "memory.h"

namespace ptx {

// ---------------------------------------------------------------- order by fences
// Blocks that communicate are taken as ordered if one of them has published and the other has acquired: has executed a
// fence (or a release) and then an atomic or a strong store, and a strong read and then a fence (or an acquire).  Which
// flag that was, and whether the value read was the one written, is not tracked.  What a block does after its fence is
// not published by it.  Threads of a block are ordered with less: a fence or a release, and a strong read.
static void order_threads(Thread& t) {
  std::atomic_thread_fence(std::memory_order_seq_cst);  // blocks may run on several OS threads
  state_of(t).released = true;
}

void thread_fence(Thread& t, bool device) {
  thread_release(t, device);
  BlockState& b = block_of(t);
  if (device && b.observed) b.acquired = true;
}

void thread_release(Thread& t, bool device) {
  order_threads(t);
  BlockState& b = block_of(t);
  if (device) b.fenced = b.time++;
}

void thread_publish(Thread& t) {
  BlockState& b = block_of(t);
  if (!b.launch.published.empty()) __atomic_store_n(&b.launch.published[b.linear], b.fenced, __ATOMIC_RELAXED);
}

void thread_observe(Thread& t, bool device, bool acquires) {
  state_of(t).acquired = true;
  BlockState& b = block_of(t);
  if (!device) return;
  b.observed = true;
  b.acquired |= acquires;
}

// Whether what block `other` (index + 1) did at that time of its own is known to this one.
static bool blocks_ordered(const BlockState& b, uint32_t other, uint32_t time) {
  if (!b.acquired || other == kMany) return b.acquired;
  return __atomic_load_n(&b.launch.published[other - 1], __ATOMIC_RELAXED) >= time;
}

// ---------------------------------------------------------------- between blocks
[[noreturn, gnu::cold]] static void block_race(ThreadState& t, const char* what, uint64_t addr, uint32_t other) {
  char text[160];
  std::string peer = other == kMany ? "several blocks" : "block " + std::to_string(other - 1);
  snprintf(text, sizeof text, "race between blocks: %s at address 0x%llx, against %s", what, (unsigned long long)addr,
           peer.c_str());
  fail(t, text);
}

template <Access K>
static BlockCell after(ThreadState& t, BlockCell c, uint64_t addr) {
  const BlockState& b = block_of(t);
  const uint32_t me = b.linear + 1, writer = c.writer & ~kStrong;
  if (K == Access::ReadOnly && c.writer)
    block_race(t, "ld.global.nc of a byte that the kernel has written", addr, writer);
  bool both_strong = is_strong(K) && (c.writer & kStrong);
  if (c.writer && writer != me && !both_strong && !blocks_ordered(b, writer, c.time))
    block_race(t, is_read(K) ? "read after write" : "write after write", addr, writer);
  if constexpr (K == Access::Read || K == Access::ReadOnly) {
    c.reader = c.reader == 0 || c.reader == me ? me : kMany;
  } else if constexpr (K != Access::StrongRead) {
    if (c.reader && c.reader != me && !blocks_ordered(b, c.reader, 1))
      block_race(t, "write after read", addr, c.reader);
    if (is_strong(K) && c.writer != me)
      c.writer = kStrong | (writer == 0 || writer == me ? me : kMany);
    else
      c.writer = me;
    c.time = b.time;
  }
  return c;
}

template <Access K>
static void touch(ThreadState& t, BlockCell* c, uint64_t addr, unsigned n) {
  const BlockCell first = *c;
  bool uniform = true;
  for (unsigned i = 1; i < n; i++) uniform &= c[i] == first;
  if (uniform) {
    BlockCell now = after<K>(t, first, addr);
    if (now != first)
      for (unsigned i = 0; i < n; i++) c[i] = now;
    return;
  }
  for (unsigned i = 0; i < n; i++) c[i] = after<K>(t, c[i], addr + i);
}

void touch_blocks(ThreadState& t, BlockCell* c, uint64_t addr, unsigned n, Access kind) {
  switch (kind) {
    case Access::Read:
      return touch<Access::Read>(t, c, addr, n);
    case Access::ReadOnly:
      return touch<Access::ReadOnly>(t, c, addr, n);
    case Access::Write:
      return touch<Access::Write>(t, c, addr, n);
    case Access::StrongRead:
      return touch<Access::StrongRead>(t, c, addr, n);
    case Access::StrongWrite:
    case Access::Atomic:
      return touch<Access::Atomic>(t, c, addr, n);
  }
}

// ---------------------------------------------------------------- inside a block
// Whether an earlier access of thread `other` (index + 1) is ordered before this one by something else than a barrier.
static bool threads_ordered(const ThreadState& t, unsigned other) {
  return t.acquired && block_of(t).threads[other - 1].released;
}

[[noreturn, gnu::cold]] static void thread_race(ThreadState& t, const char* memory, const char* what, uint64_t where,
                                                const std::string& other) {
  char text[160];
  snprintf(text, sizeof text, "%s memory race: %s at 0x%llx, against %s", memory, what, (unsigned long long)where,
           other.c_str());
  fail(t, text);
}

void touch_threads(ThreadState& t, ThreadCell* c, const uint8_t* bytes, unsigned n, Access kind, const void* data,
                   bool fences, const char* memory, uint64_t where) {
  BlockState& b = block_of(t);
  const uint32_t epoch = b.epoch, warp_epoch = b.warps[t.warp()].epoch;
  const uint16_t me = t.lin + 1, warp = t.warp() + 1;
  const bool read = is_read(kind), strong = is_strong(kind);
  const auto* written = static_cast<const uint8_t*>(data);
  for (unsigned i = 0; i < n; i++, c++) {
    const bool unchanged = written && written[i] == bytes[i];
    const bool same_warp = c->writer && (c->writer - 1u) / 32 == t.warp();
    if (c->writer && c->writer != me && c->write_epoch == epoch && !(same_warp && c->write_warp_epoch != warp_epoch) &&
        !(strong && c->strong) && !unchanged && !(fences && threads_ordered(t, c->writer)))
      thread_race(t, memory, read ? "read after write" : "write after write", where + i,
                  "thread " + std::to_string(c->writer - 1));
    if (kind == Access::StrongRead) continue;
    if (read) {
      if (c->read_epoch != epoch) {
        c->read_epoch = epoch;
        c->other_warp = c->reader_warp = 0;
      }
      if (c->reader_warp != warp || c->read_warp_epoch != warp_epoch) {
        if (c->reader_warp != warp && c->reader_warp) c->other_warp = c->reader_warp;
        c->reader_warp = warp;
        c->read_warp_epoch = warp_epoch;
        c->read_lanes = 0;
      }
      c->read_lanes |= 1u << t.lane();
      continue;
    }
    if (c->read_epoch == epoch && !unchanged && !(fences && t.acquired)) {
      unsigned other = c->reader_warp != warp ? c->reader_warp : c->other_warp != warp ? c->other_warp : 0;
      if (other) thread_race(t, memory, "write after read", where + i, "warp " + std::to_string(other - 1));
      uint32_t lanes = c->read_warp_epoch == warp_epoch ? c->read_lanes & ~(1u << t.lane()) : 0;
      if (lanes)
        thread_race(t, memory, "write after read", where + i,
                    "thread " + std::to_string(t.lin - t.lane() + std::countr_zero(lanes)));
    }
    c->writer = me;
    c->write_epoch = epoch;
    c->write_warp_epoch = warp_epoch;
    c->strong = strong;
  }
}

}  // namespace ptx
