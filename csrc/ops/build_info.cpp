// What was built and what is in use, for saft_kernels/backends.py.

#include <torch/csrc/stable/library.h>

#include <string>

#include "../cpu/isa.h"

namespace saft {
namespace {

std::string build_info() {
  return std::string("version=" SAFT_VERSION "\ncompiler=" SAFT_COMPILER "\nabi_target=" SAFT_ABI_TARGET
                     "\ncuda=" SAFT_CUDA_STATUS "\narchitecture=" SAFT_ARCHITECTURE);
}

std::string cpu_isas() {
  std::string joined;
  for (const std::string& name : cpu::isa_names()) joined += (joined.empty() ? "" : ",") + name;
  return joined;
}

std::string cpu_isa() {
  return cpu::isa_name(cpu::isa());
}

void set_cpu_isa(std::string name) {
  cpu::set_isa(name);
}

}  // namespace
}  // namespace saft

STABLE_TORCH_LIBRARY_IMPL(saft_kernels, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&saft::build_info));
  m.impl("cpu_isas", TORCH_BOX(&saft::cpu_isas));
  m.impl("cpu_isa", TORCH_BOX(&saft::cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&saft::set_cpu_isa));
}
