// Context switch between fibers of one OS thread.
#pragma once
#include <cstddef>
#include <cstdint>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace ptx {

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, and continues where `load_sp` was saved.
extern "C" void ptxsim_switch(void** save_sp, void* load_sp);

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
};

inline void fiber_switch(Fiber& from, Fiber& to) {
  ptxsim_switch(&from.sp, to.sp);
}

inline void fiber_init(Fiber& f, size_t size, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(f.stack) + size;
  void** s = reinterpret_cast<void**>(top & ~uintptr_t(15));
  *--s = nullptr;
  *--s = reinterpret_cast<void*>(entry);  // return address; rsp % 16 == 8 on entry
  for (int i = 0; i < 6; i++) *--s = nullptr;
  f.sp = s;
}
#else
struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
};

inline void fiber_switch(Fiber& from, Fiber& to) {
  swapcontext(&from.context, &to.context);
}

inline void fiber_init(Fiber& f, size_t size, void (*entry)()) {
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = size;
  f.context.uc_link = nullptr;
  makecontext(&f.context, entry, 0);
}
#endif

}  // namespace ptx
