// What happens to an access that the inline checks of memory.h do not settle.
#include "memory.h"
#include "races.h"

namespace ptx {

[[noreturn, gnu::cold]] static void fault(const Thread& t, const char* what, uint64_t addr, unsigned n) {
  char text[120];
  snprintf(text, sizeof text, "%s: address 0x%llx size %u", what, (unsigned long long)addr, n);
  fail(t, text);
}

static const Range* find_range(BlockState& b, uint64_t addr, unsigned n, unsigned site) {
  auto holds = [&](const Range& r) { return addr - r.base < r.size && n <= r.size - (addr - r.base); };
  const Range*& recent = b.recent[site % kHot];
  if (recent && holds(*recent)) return recent;
  auto& ranges = b.launch.ranges;
  auto it = std::upper_bound(ranges.begin(), ranges.end(), addr, [](uint64_t a, const Range& r) { return a < r.base; });
  if (it == ranges.begin() || !holds(*--it)) return nullptr;
  return recent = &*it;
}

void check_global(Thread& thread, uint64_t addr, unsigned n, Access kind, unsigned site, const void* data) {
  ThreadState& t = state_of(thread);
  BlockState& b = block_of(t);
  if (addr & (n - 1)) fault(t, "misaligned global memory access", addr, n);
  const Range* r = find_range(b, addr, n, site);
  if (!r) {
    if (b.launch.opt.bounds) fault(t, "global memory access out of bounds", addr, n);
    return;
  }
  if (r->blocks) touch_blocks(t, r->blocks + (addr - r->base), addr, n, kind);
  if (r->threads)
    touch_threads(t, r->threads + (addr - r->base), reinterpret_cast<uint8_t*>(addr), n, kind, data, true, "global",
                  addr);
  if (!r->blocks && !r->threads) b.hot[site % kHot] = {r->base, r->size};
}

void check_shared(Thread& thread, uint64_t addr, unsigned n, Access kind, const void* data) {
  ThreadState& t = state_of(thread);
  BlockState& b = block_of(t);
  if (addr + n > b.shared_size) fault(t, "shared memory access out of bounds", addr, n);
  if (addr & (n - 1)) fault(t, "misaligned shared memory access", addr, n);
  if (b.shared_races)
    touch_threads(t, b.shared_shadow.as<ThreadCell>() + addr, b.shared + addr, n, kind, data, false, "shared", addr);
}

void local_fault(Thread& t, uint64_t addr, unsigned n) {
  fault(t, addr & (n - 1) ? "misaligned local memory access" : "local memory access out of bounds", addr, n);
}

void check_param(Thread& t, uint64_t addr, unsigned n, Access kind) {
  uint64_t off = addr - reinterpret_cast<uint64_t>(t.block->params);
  if (off >= t.block->params_size || n > t.block->params_size - off)
    fault(t, "parameter access out of bounds", addr, n);
  if (off & (n - 1)) fault(t, "misaligned parameter access", addr, n);
  if (!is_read(kind)) fault(t, "write to a parameter", addr, n);
}

uint8_t* generic_ptr(Thread& t, uint64_t addr, unsigned n, Access kind, unsigned site, const void* data) {
  if (is_shared_address(t, addr))
    return shared_ptr(t, addr - reinterpret_cast<uint64_t>(t.block->shared), n, kind, data);
  if (is_local_address(t, addr)) return local_ptr(t, addr - t.stack, n);
  if (is_param_address(t, addr)) return pointer<Space::Param>(t, addr, n, kind, site);
  return global_ptr(t, addr, n, kind, site, data);
}

// ---------------------------------------------------------------- cp.async
// The copy takes place when the thread waits for it, as late as the ISA allows, so that a missing wait shows up as
// stale data.
void cp_async(Thread& t, uint64_t dst, uint64_t src, uint32_t n, uint32_t src_n) {
  src_n = std::min(src_n, n);
  dst &= 0xffffffffu;
  if (dst + n > t.block->shared_size) fault(t, "shared memory access out of bounds", dst, n);
  if (dst & (n - 1)) fault(t, "misaligned shared memory access", dst, n);
  if (src_n && (src & (n - 1))) fault(t, "misaligned global memory access", src, n);
  state_of(t).copies.push_back({dst, src, n, src_n});
}

static void cp_async_finish(ThreadState& t, size_t end) {
  for (size_t i = 0; i < end; i++) {
    const AsyncCopy& c = t.copies[i];
    uint8_t data[16] = {};
    unsigned step = std::has_single_bit(c.src_size) ? c.src_size : 1;
    for (unsigned k = 0; k < c.src_size; k += step)
      std::memcpy(data + k, global_ptr(t, c.src + k, step, Access::Read, 0), step);
    std::memcpy(shared_ptr(t, c.dst, c.size, Access::Write, data), data, c.size);
  }
  t.copies.erase(t.copies.begin(), t.copies.begin() + end);
}

void cp_async_commit(Thread& t) {
  state_of(t).copy_groups.push_back(state_of(t).copies.size());
}

void cp_async_wait_group(Thread& thread, size_t pending) {
  ThreadState& t = state_of(thread);
  if (t.copy_groups.size() <= pending) return;
  size_t groups = t.copy_groups.size() - pending, end = t.copy_groups[groups - 1];
  cp_async_finish(t, end);
  t.copy_groups.erase(t.copy_groups.begin(), t.copy_groups.begin() + groups);
  for (size_t& g : t.copy_groups) g -= end;
}

void cp_async_wait_all(Thread& thread) {
  ThreadState& t = state_of(thread);
  cp_async_finish(t, t.copies.size());
  t.copy_groups.clear();
}

}  // namespace ptx
