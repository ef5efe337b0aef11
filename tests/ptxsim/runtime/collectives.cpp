// Barriers and warp collectives: bar, shfl, vote, match, redux.
#include "collectives.h"

#include "math.h"

namespace ptx {

// ---------------------------------------------------------------- block barriers
void release_barrier(BlockState& b, unsigned id) {
  Barrier& bar = b.barriers[id];
  const ThreadState* first = nullptr;  // of the warp at hand
  for (ThreadState& t : b.threads) {
    if (t.state != State::AtBarrier || t.barrier_id != id) continue;
    if (first && first->warp() == t.warp() && t.barrier_aligned && first->barrier_site != t.barrier_site)
      fail(t, "divergent barrier: threads of a warp wait at different bar instructions");
    if (!first || first->warp() != t.warp()) first = &t;
    t.state = State::Ready;
    t.barrier_result = bar.sum;
  }
  bar = Barrier{};
  b.epoch++;
}

static bool barrier_complete(const BlockState& b, const Barrier& bar) {
  if (bar.arrived == (bar.expected ? bar.expected : b.threads.size())) return true;
  return !bar.expected && b.launch.opt.allow_exited && bar.arrived == b.alive;
}

static Barrier& barrier_enter(ThreadState& t, unsigned id, unsigned count, unsigned add) {
  BlockState& b = block_of(t);
  if (id > 15) fail(t, "barrier id out of range");
  if (count % 32) fail(t, "barrier thread count is not a multiple of 32");
  unsigned all = b.threads.size();
  if (count > all && count - all < 32) count = all;  // the last warp counts as a full one
  Barrier& bar = b.barriers[id];
  if (bar.arrived && (bar.expected ? bar.expected : all) != (count ? count : all))
    fail(t, "threads disagree on the thread count of a barrier");
  bar.expected = count;
  bar.arrived++;
  bar.sum += add;
  return bar;
}

unsigned barrier_sync(Thread& thread, unsigned id, unsigned count, unsigned site, bool aligned, unsigned add) {
  ThreadState& t = state_of(thread);
  BlockState& b = block_of(t);
  Barrier& bar = barrier_enter(t, id, count, add);
  t.barrier_id = id;
  t.barrier_site = site;
  t.barrier_aligned = aligned;
  if (barrier_complete(b, bar)) {
    t.state = State::AtBarrier;
    release_barrier(b, id);
  } else {
    suspend(t, State::AtBarrier, "bar.sync");
  }
  return t.barrier_result;
}

void barrier_arrive(Thread& t, unsigned id, unsigned count) {
  BlockState& b = block_of(t);
  if (barrier_complete(b, barrier_enter(state_of(t), id, count, 0))) release_barrier(b, id);
}

// ---------------------------------------------------------------- warp collectives
static uint32_t existing_lanes(const Thread& t) {
  size_t size = block_of(t).threads.size() - (t.lin - t.lane());
  return size >= 32 ? ~0u : (1u << size) - 1;
}

void collective(Thread& thread, uint32_t mask, CollectiveFn fn, unsigned tag, void* slot, const char* what) {
  ThreadState& t = state_of(thread);
  BlockState& b = block_of(t);
  const unsigned lane = t.lane(), first = t.lin - lane;
  if (!(mask >> lane & 1)) fail(t, std::string(what) + ": calling lane not in mask");
  mask &= existing_lanes(t);
  Warp& w = b.warps[t.warp()];
  w.wait_mask[lane] = mask;
  w.fn[lane] = fn;
  w.tag[lane] = tag;
  w.slot[lane] = slot;
  for (uint32_t m = mask; m; m &= m - 1) {
    int l = std::countr_zero(m);
    if (w.wait_mask[l] != mask || w.fn[l] != fn || w.tag[l] != tag) return suspend(t, State::InCollective, what);
  }
  fn(w.slot, mask);
  for_lanes(mask, [&](unsigned l) {
    w.wait_mask[l] = 0;
    if (l != lane) b.threads[first + l].state = State::Ready;
  });
}

void warp_sync(Thread& t, uint32_t mask) {
  auto count = [](void** slots, uint32_t m) { static_cast<Warp*>(slots[std::countr_zero(m)])->epoch++; };
  collective(t, mask, count, 0, &block_of(t).warps[t.warp()], "bar.warp.sync");
}

struct ShflSlot {
  const Thread* thread;
  Shfl mode;
  uint32_t value, b, c;
  Shuffled result;
};

static void exchange(void** slots, uint32_t mask) {
  for_lanes(mask, [&](int lane) {
    auto& s = *static_cast<ShflSlot*>(slots[lane]);
    int delta = s.b & 31, clamp = s.c & 31, segment = s.c >> 8 & 31;
    int hi = (lane & segment) | (clamp & ~segment), lo = lane & segment;
    int src = s.mode == Shfl::Up     ? lane - delta
              : s.mode == Shfl::Down ? lane + delta
              : s.mode == Shfl::Bfly ? lane ^ delta
                                     : lo | (delta & ~segment);
    s.result.pred = s.mode == Shfl::Up ? src >= hi : src <= hi;
    if (!s.result.pred) src = lane;
    if (!(mask >> src & 1)) fail(*s.thread, "shfl.sync: source lane " + std::to_string(src) + " is not in the mask");
    s.result.out = static_cast<ShflSlot*>(slots[src])->value;
  });
}

Shuffled shfl(Thread& t, Shfl mode, uint32_t mask, uint32_t value, uint32_t b, uint32_t c) {
  ShflSlot slot{&t, mode, value, b, c, {}};
  collective(t, mask, exchange, unsigned(mode), &slot, "shfl.sync");
  return slot.result;
}

struct VoteSlot {
  uint64_t in;
  uint32_t out;
};

uint32_t ballot(Thread& t, uint32_t mask, bool p) {
  VoteSlot slot{p, 0};
  auto count = [](void** slots, uint32_t m) {
    uint32_t r = 0;
    for_lanes(m, [&](int l) { r |= uint32_t(static_cast<VoteSlot*>(slots[l])->in) << l; });
    for_lanes(m, [&](int l) { static_cast<VoteSlot*>(slots[l])->out = r; });
  };
  collective(t, mask, count, 0, &slot, "vote.sync");
  return slot.out;
}

bool vote_any(Thread& t, uint32_t mask, bool p) {
  return ballot(t, mask, p) != 0;
}
bool vote_all(Thread& t, uint32_t mask, bool p) {
  return ballot(t, mask, !p) == 0;
}
bool vote_uni(Thread& t, uint32_t mask, bool p) {
  uint32_t yes = ballot(t, mask, p);
  return yes == 0 || yes == (mask & existing_lanes(t));
}

uint32_t match_any(Thread& t, uint32_t mask, uint64_t v) {
  VoteSlot slot{v, 0};
  auto compare = [](void** slots, uint32_t m) {
    for_lanes(m, [&](int l) {
      auto& s = *static_cast<VoteSlot*>(slots[l]);
      for_lanes(m, [&](int k) { s.out |= uint32_t(static_cast<VoteSlot*>(slots[k])->in == s.in) << k; });
    });
  };
  collective(t, mask, compare, 0, &slot, "match.sync");
  return slot.out;
}

Shuffled match_all(Thread& t, uint32_t mask, uint64_t v) {
  uint32_t same = match_any(t, mask, v);
  bool all = same == (mask & existing_lanes(t));
  return {all ? same : 0, all};
}

template <class T>
static T combine(Redux op, T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (op == Redux::MinF) return fmin_num(a, b);
    if (op == Redux::MaxF) return fmax_num(a, b);
    return op == Redux::MinNan ? fmin_nan(a, b) : fmax_nan(a, b);
  } else {
    if (op == Redux::Add) return a + b;
    if (op == Redux::And) return a & b;
    if (op == Redux::Or) return a | b;
    if (op == Redux::Xor) return a ^ b;
    return op == Redux::MinU || op == Redux::MinS ? std::min(a, b) : std::max(a, b);
  }
}

struct ReduxSlot {
  Redux op;
  uint32_t value;
};

template <class T>
static void reduce(void** slots, uint32_t mask) {
  auto slot = [&](int l) { return static_cast<ReduxSlot*>(slots[l]); };
  int first = std::countr_zero(mask);
  T r = std::bit_cast<T>(slot(first)->value);
  for_lanes(mask & (mask - 1), [&](int l) { r = combine(slot(l)->op, r, std::bit_cast<T>(slot(l)->value)); });
  for_lanes(mask, [&](int l) { slot(l)->value = std::bit_cast<uint32_t>(r); });
}

uint32_t redux(Thread& t, Redux op, uint32_t mask, uint32_t value) {
  ReduxSlot slot{op, value};
  CollectiveFn fn = op >= Redux::MinF                        ? reduce<float>
                    : op == Redux::MinS || op == Redux::MaxS ? reduce<int32_t>
                                                             : reduce<uint32_t>;
  collective(t, mask, fn, unsigned(op), &slot, "redux.sync");
  return slot.value;
}

}  // namespace ptx
