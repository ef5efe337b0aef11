// Runs blocks.  One block at a time is executed per OS thread.  A CUDA thread that waits keeps its fiber, and another
// fiber goes on with the next thread; fibers switch only at barriers, warp collectives and polling operations.
#include "scheduler.h"
#include "collectives.h"
#include "memory.h"

#if defined(__x86_64__)
asm(R"(
.text
.globl ptxsim_switch
.hidden ptxsim_switch
.type ptxsim_switch,@function
ptxsim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ptxsim_switch,.-ptxsim_switch
)");
#endif

namespace ptx {

namespace {

struct Abort {};       // unwinds the other threads of a block after an error
struct ThreadExit {};  // unwinds one thread

thread_local BlockState* running = nullptr;

constexpr size_t kStackBytes = 128 << 10, kColours = 16 << 10;

void fiber_main();

// Stacks are kept for the next launch: mapping them costs more than a small launch.
class FiberPool {
 public:
  explicit FiberPool(size_t stack_size) : stack_size_(stack_size) {}
  FiberPool(const FiberPool&) = delete;
  ~FiberPool() { clear(); }

  std::vector<Fiber*> take_all(size_t stack_size) {
    if (stack_size != stack_size_) clear();
    stack_size_ = stack_size;
    return std::exchange(free_, {});
  }
  void give_back(std::vector<Fiber*> fibers) { free_ = std::move(fibers); }

  static Fiber* make(size_t stack_size, size_t index) {
    void* p = mmap(nullptr, stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, 4096, PROT_NONE);  // guard page
    auto* f = new Fiber;
    f->stack = static_cast<char*>(p);
    // Stacks that start at the same place in a page would compete for the same cache lines.
    fiber_init(*f, stack_size - index * 1088 % kColours, fiber_main);
    return f;
  }

 private:
  void clear() {
    for (Fiber* f : free_) {
      munmap(f->stack, stack_size_);
      delete f;
    }
    free_.clear();
  }
  size_t stack_size_;
  std::vector<Fiber*> free_;
};

thread_local FiberPool pool{0};

void run_thread(BlockState& b, ThreadState& t) {
  try {
    b.launch.args.kernel(b.params, t);
  } catch (const Abort&) {
  } catch (const ThreadExit&) {
  } catch (const std::exception& e) {
    if (b.error.empty()) b.error = e.what();
  }
  t.state = State::Done;
  b.alive--;
}

void start(BlockState& b, ThreadState& t, Fiber* fiber) {
  t.state = State::Ready;
  t.fiber = fiber;
  t.stack = reinterpret_cast<uint64_t>(fiber->stack);
  t.stack_size = b.stack_size;
}

// Fiber of the next thread of this pass that can run; the scheduler's if there is none.  Threads switch to each other
// directly: going through the scheduler would double the number of switches.
Fiber& next_fiber(BlockState& b) {
  while (++b.cursor < b.order.size()) {
    ThreadState& t = b.threads[b.order[b.cursor]];
    if (t.state == State::Ready) return *t.fiber;
    if (t.state != State::Fresh) continue;
    if (!b.error.empty()) {  // another thread has failed: do not start
      t.state = State::Done;
      b.alive--;
      continue;
    }
    if (b.free_fibers.empty()) b.free_fibers.push_back(FiberPool::make(b.stack_size, b.fibers++));
    start(b, t, b.free_fibers.back());
    b.free_fibers.pop_back();
    return *t.fiber;
  }
  return b.main;
}

// The next thread, if it has not started yet: the fiber at hand can go on with it.
ThreadState* next_fresh(BlockState& b) {
  if (!b.error.empty() || b.cursor + 1 >= b.order.size()) return nullptr;
  ThreadState& t = b.threads[b.order[b.cursor + 1]];
  return t.state == State::Fresh ? &t : nullptr;
}

void fiber_main() {
  for (;;) {
    BlockState& b = *running;
    ThreadState* t = &b.threads[b.order[b.cursor]];
    Fiber& self = *t->fiber;
    run_thread(b, *t);
    while ((t = next_fresh(b))) {
      b.cursor++;
      start(b, *t, &self);
      run_thread(b, *t);
    }
    Fiber& next = next_fiber(b);
    b.free_fibers.push_back(&self);
    fiber_switch(self, next);
  }
}

void check_deadline(const Thread& t) {
  if (std::chrono::steady_clock::now() > block_of(t).launch.deadline)
    fail(t, "timeout: the thread loops, or waits for another one that does not come");
}

}  // namespace

// ---------------------------------------------------------------- called by threads
std::string place(const Thread& t) {
  char text[120];
  const Dim3 &b = t.block->idx, &i = t.tid;
  snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u)", b.x, b.y, b.z, i.x, i.y, i.z);
  return text;
}

void fail(const Thread& t, const std::string& what) {
  throw std::runtime_error(what + ", " + place(t));
}
void trap(Thread& t, const char* what) {
  fail(t, what);
}
void exit_thread() {
  throw ThreadExit{};
}

void assert_failed(Thread& t, uint64_t message, uint64_t file, uint32_t line, uint64_t function) {
  auto text = [&](uint64_t address) {  // at most 1000 characters of the module's memory
    std::string s;
    for (char c; s.size() < 1000 && (c = *generic_ptr(t, address + s.size(), 1, Access::Read, 0, nullptr));) s += c;
    return s;
  };
  fail(t, "assertion failed: " + text(message) + " at " + text(file) + ":" + std::to_string(line) + " in " +
              text(function));
}

void suspend(ThreadState& t, State state, const char* what) {
  BlockState& b = block_of(t);
  t.state = state;
  t.waiting_for = what;
  fiber_switch(*t.fiber, next_fiber(b));
  if (!b.error.empty()) throw Abort{};
}

void poll(Thread& thread, unsigned interval) {
  ThreadState& t = state_of(thread);
  if (++t.polls % interval) return;
  if (t.polls % 4096 == 0 || interval == 1) check_deadline(t);
  suspend(t, State::Ready, "polling");
}

void refuel(Thread& t) {
  t.fuel = kFuel;
  check_deadline(t);
}

// ---------------------------------------------------------------- one block
BlockState::BlockState(Launch& l) : launch(l) {
  const LaunchArgs& a = l.args;
  size_t n = a.block.count();
  dim = a.block;
  grid = a.grid;
  params = a.params;
  params_size = a.params_size;
  globals = a.globals;
  static_shared = a.static_shared;
  shared_size = uint64_t(a.static_shared) + a.dynamic_shared;
  stack_size = (kStackBytes + kColours + a.local_bytes + 65535) / 65536 * 65536;
  threads.resize(n);
  warps.resize((n + 31) / 32);
  if (shared_size) {
    shared_memory.reset(static_cast<uint8_t*>(std::aligned_alloc(1024, (shared_size + 1023) / 1024 * 1024)));
    if (!shared_memory) throw std::bad_alloc();
    shared = shared_memory.get();
    if (l.opt.shared_races) shared_shadow = Pages(shared_size * sizeof(ThreadCell));
    shared_races = l.opt.shared_races;
  }
  for (size_t i = 0; i < n; i++) {
    ThreadState& t = threads[i];
    t.lin = i;
    t.block = this;
    t.tid = {unsigned(i % dim.x), unsigned(i / dim.x % dim.y), unsigned(i / dim.x / dim.y)};
    order.push_back(i);
  }
  if (l.opt.order == 1) std::reverse(order.begin(), order.end());
  free_fibers = pool.take_all(stack_size);
  fibers = free_fibers.size();
}

BlockState::~BlockState() {
  pool.give_back(std::move(free_fibers));
}

static void describe_deadlock(BlockState& b) {
  b.error = "deadlock: " + std::to_string(b.threads.size() - b.alive) + " threads exited;";
  int shown = 0;
  for (auto& t : b.threads)
    if (t.state != State::Done && shown++ < 4) b.error += " " + place(t) + " waits at " + t.waiting_for + ";";
}

static void reset(BlockState& b) {
  b.alive = b.threads.size();
  b.epoch++;
  b.time = 1;
  b.fenced = 0;
  b.observed = b.acquired = false;
  for (auto& w : b.warps) std::memset(w.wait_mask, 0, sizeof w.wait_mask);
  for (auto& bar : b.barriers) bar = Barrier{};
  if (b.shared_size) std::memset(b.shared, 0xCB, b.shared_size);  // poison
  for (auto& t : b.threads) {
    t.state = State::Fresh;
    t.released = t.acquired = false;
    t.copies.clear();
    t.copy_groups.clear();
  }
}

// Starts or resumes every thread that can run, once; whether there was one.
static bool pass(BlockState& b) {
  b.cursor = size_t(-1);
  Fiber& first = next_fiber(b);
  if (&first == &b.main) return false;
  fiber_switch(b.main, first);
  return true;
}

// Threads that have exited no longer hold up the others; whether that released a barrier.
static bool release_for_exited(BlockState& b) {
  bool released = false;
  for (unsigned id = 0; id < 16; id++) {
    const Barrier& bar = b.barriers[id];
    if (!bar.arrived || bar.expected || bar.arrived != b.alive) continue;
    release_barrier(b, id);
    released = true;
  }
  return released;
}

static void run_block(BlockState& b) {
  reset(b);
  while (b.alive) {
    if (pass(b) || !b.alive) continue;
    try {
      if (b.launch.opt.allow_exited && b.error.empty() && release_for_exited(b)) continue;
      if (b.error.empty()) describe_deadlock(b);
    } catch (const std::runtime_error& e) {
      b.error = e.what();
    }
    for (auto& t : b.threads)
      if (t.state != State::Done) t.state = State::Ready;  // unwinds through Abort
  }
}

static void shuffle(std::vector<unsigned>& order, uint64_t& seed) {
  for (size_t k = order.size(); k > 1; k--) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(order[k - 1], order[(seed >> 33) % k]);
  }
}

void run_blocks(Launch& l, const BlockOrder& block_order, std::atomic<size_t>& next, std::atomic<bool>& failed,
                std::string& error) {
  BlockState b(l);
  BlockState* saved = std::exchange(running, &b);
  uint64_t seed = l.opt.seed;
  const size_t blocks = l.args.grid.count();
  for (size_t i; !failed && (i = next++) < blocks;) {
    if (l.opt.order == 2) shuffle(b.order, seed);
    size_t j = block_order(i);
    b.linear = j;
    b.idx = {unsigned(j % b.grid.x), unsigned(j / b.grid.x % b.grid.y), unsigned(j / b.grid.x / b.grid.y)};
    run_block(b);
    if (!b.error.empty() && !failed.exchange(true)) error = b.error;
  }
  running = saved;
}

}  // namespace ptx
