#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace saft::cpu {
namespace {

bool runs_here(Isa isa) {
#ifdef SAFT_X86_64
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::baseline;
}

constexpr Isa kAll[] = {Isa::baseline, Isa::avx2, Isa::avx512};

Isa best() {
  Isa best = Isa::baseline;
  for (Isa isa : kAll)
    if (runs_here(isa)) best = isa;
  return best;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

}  // namespace

Isa isa() {
  return current().load(std::memory_order_relaxed);
}

std::string isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (Isa isa : kAll)
    if (runs_here(isa)) names.push_back(isa_name(isa));
  return names;
}

void set_isa(const std::string& name) {
  for (Isa isa : kAll)
    if (isa_name(isa) == name && runs_here(isa)) {
      current().store(isa, std::memory_order_relaxed);
      return;
    }
  throw std::runtime_error("CPU instruction set '" + name + "' was not compiled or cannot run on this CPU");
}

}  // namespace saft::cpu
