// What a translated kernel sees of the machine.  Every kernel compiles this: no large standard headers here.
//
// Addresses: global, const, param and generic addresses are host addresses; shared and local addresses are offsets
// (cvta adds the host address), because compilers may keep them in 32 bits.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ptx {

struct Dim3 {
  uint32_t x, y, z;
  size_t count() const { return size_t(x) * y * z; }
};

enum class Space : uint8_t { Global, Shared, Local, Param, Generic };

// Strong: volatile, relaxed, acquire, release.  ReadOnly: ld.global.nc.
enum class Access : uint8_t { Read, ReadOnly, Write, StrongRead, StrongWrite, Atomic };

constexpr bool is_read(Access k) {
  return k == Access::Read || k == Access::ReadOnly || k == Access::StrongRead;
}
constexpr bool is_strong(Access k) {
  return k >= Access::StrongRead;
}

// The range of global memory that an instruction hit last.  Empty while races are checked, so that every access takes
// the slow path.
struct Hot {
  uint64_t base = 0, size = 0;
};
constexpr unsigned kHot = 16;

struct Block {
  Dim3 idx{}, dim{}, grid{};
  uint8_t* shared = nullptr;
  uint64_t shared_size = 0, static_shared = 0;
  bool shared_races = false;
  const uint8_t* params = nullptr;
  uint64_t params_size = 0;
  uint8_t* globals = nullptr;  // module variables
  Hot hot[kHot];
};

constexpr uint32_t kFuel = 1 << 16;

struct Thread {
  Dim3 tid{};
  uint32_t lin = 0;       // linear index in the block
  uint32_t carry = 0;     // CC.CF
  uint32_t fuel = kFuel;  // jumps back until the clock is read
  Block* block = nullptr;
  uint64_t stack = 0, stack_size = 0;

  uint32_t lane() const { return lin & 31; }
  uint32_t warp() const { return lin >> 5; }
};

#pragma GCC visibility push(default)  // what follows is called by kernels

// ---------------------------------------------------------------- scheduling (scheduler.cpp)
// Called by operations that may wait for other threads (strong loads, atomics, nanosleep): every `interval`-th call
// lets the other threads of the block run, and fails after the launch's timeout.
void poll(Thread& t, unsigned interval);
void refuel(Thread& t);
[[noreturn]] void exit_thread();  // `exit` inside a .func
[[noreturn]] void trap(Thread& t, const char* what);
[[noreturn]] void assert_failed(Thread& t, uint64_t message, uint64_t file, uint32_t line, uint64_t function);

// ---------------------------------------------------------------- barriers and warps (collectives.cpp)
void barrier_arrive(Thread& t, unsigned id, unsigned count);
// Returns the sum of `add` over the participants.
unsigned barrier_sync(Thread& t, unsigned id, unsigned count, unsigned site, bool aligned, unsigned add = 0);

struct Shuffled {
  uint32_t out;
  bool pred;
};
enum class Shfl : uint8_t { Up, Down, Bfly, Idx };
enum class Redux : uint8_t { Add, And, Or, Xor, MinU, MaxU, MinS, MaxS, MinF, MaxF, MinNan, MaxNan };

void warp_sync(Thread& t, uint32_t mask);
Shuffled shfl(Thread& t, Shfl mode, uint32_t mask, uint32_t value, uint32_t b, uint32_t c);
uint32_t ballot(Thread& t, uint32_t mask, bool p);
bool vote_any(Thread& t, uint32_t mask, bool p);
bool vote_all(Thread& t, uint32_t mask, bool p);
bool vote_uni(Thread& t, uint32_t mask, bool p);
uint32_t match_any(Thread& t, uint32_t mask, uint64_t v);
Shuffled match_all(Thread& t, uint32_t mask, uint64_t v);
uint32_t redux(Thread& t, Redux op, uint32_t mask, uint32_t value);

// ---------------------------------------------------------------- matrices (matrix.cpp)
enum class Elem : uint8_t { F16, BF16, TF32, S8, U8 };
enum class Acc : uint8_t { F32, F16, S32 };

// 8x8 matrices of 16-bit elements, `count` of them.
void ldmatrix(Thread& t, int count, bool trans, uint64_t addr, uint32_t* reg);
void stmatrix(Thread& t, int count, bool trans, uint64_t addr, const uint32_t* reg);
// mma.sync.aligned.m16n8k{k}.row.col: the sum over k and the addition of c are done in double and rounded once.
void mma_m16n8(Thread& t, int k, Elem a_type, Elem b_type, Acc c_type, const uint32_t* a, const uint32_t* b,
               const uint32_t* c, uint32_t* d);

// ---------------------------------------------------------------- cp.async (access.cpp)
void cp_async(Thread& t, uint64_t dst, uint64_t src, uint32_t n, uint32_t src_n);
void cp_async_commit(Thread& t);
void cp_async_wait_group(Thread& t, size_t pending);
void cp_async_wait_all(Thread& t);

#pragma GCC visibility pop

// Called at every jump back, so that an endless loop is reported.
inline void loop(Thread& t) {
  if (!--t.fuel) [[unlikely]]
    refuel(t);
}

inline uint32_t lanemask_eq(const Thread& t) {
  return 1u << t.lane();
}
inline uint32_t lanemask_lt(const Thread& t) {
  return lanemask_eq(t) - 1;
}
inline uint32_t lanemask_le(const Thread& t) {
  return lanemask_lt(t) | lanemask_eq(t);
}
inline uint32_t lanemask_gt(const Thread& t) {
  return ~lanemask_le(t);
}
inline uint32_t lanemask_ge(const Thread& t) {
  return ~lanemask_lt(t);
}

}  // namespace ptx
