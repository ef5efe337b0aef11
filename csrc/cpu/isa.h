// CPU instruction sets: every kernel file (cpu/*_kernel.cpp) is compiled once for each of them, inside
// namespace saft::cpu::SAFT_CPU_ISA, and the one to run is chosen by CPUID when the library is first used.
//
// A kernel file may include nothing but headers whose code has internal linkage (this one, the kernel
// headers, numbers.h, simd.h, strided.h): an inline function compiled here with AVX-512 would be merged by the linker
// with its baseline twin and crash an older CPU. The build fails if such a symbol appears
// (cmake/check_isa_object.cmake).
#pragma once

#include <string>
#include <vector>

namespace saft::cpu {

enum class Isa { baseline, avx2, avx512 };

// The instruction set in use: the best that was compiled and that this CPU runs, unless set_isa chose lower.
Isa isa();

// Names of those that can run here, slowest first.
std::vector<std::string> isa_names();
std::string isa_name(Isa isa);

// Throws std::runtime_error if `name` was not compiled or this CPU cannot run it.
void set_isa(const std::string& name);

// The table that fits the instruction set in use.
template <typename Table>
const Table& choose(const Table& baseline, [[maybe_unused]] const Table& avx2, [[maybe_unused]] const Table& avx512) {
  switch (isa()) {
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return baseline;
  }
}

}  // namespace saft::cpu

// Declares `const Table name` for every instruction set, and name##_kernels() that returns the one in use.
#ifdef SAFT_X86_64
#define SAFT_DECLARE_KERNELS(Table, name)                    \
  namespace baseline {                                       \
  extern const Table name;                                   \
  }                                                          \
  namespace avx2 {                                           \
  extern const Table name;                                   \
  }                                                          \
  namespace avx512 {                                         \
  extern const Table name;                                   \
  }                                                          \
  inline const Table& name##_kernels() {                     \
    return choose(baseline::name, avx2::name, avx512::name); \
  }
#else
#define SAFT_DECLARE_KERNELS(Table, name) \
  namespace baseline {                    \
  extern const Table name;                \
  }                                       \
  inline const Table& name##_kernels() {  \
    return baseline::name;                \
  }
#endif
