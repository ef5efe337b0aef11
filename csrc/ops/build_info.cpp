// What was built and what is in use, for saft_kernels/backends.py.

#include <torch/csrc/stable/library.h>
#ifdef SAFT_CUDA_BUILT
#include <cuda_runtime_api.h>
#endif

#include <string>

#include "../cpu/isa.h"

namespace saft {
namespace {

std::string build_info() {
  return std::string("version=" SAFT_VERSION "\ncompiler=" SAFT_COMPILER "\nabi_target=" SAFT_ABI_TARGET
                     "\ncuda=" SAFT_CUDA_STATUS "\narchitecture=" SAFT_ARCHITECTURE "\nsanitizers=" SAFT_SANITIZERS);
}

// The newest CUDA that the driver supports, as 1000 * major + 10 * minor; 0 without a driver, or if nothing here needs
// one. This initialises no GPU: a process that has asked may still fork.
int64_t cuda_driver() {
  int version = 0;
#ifdef SAFT_CUDA_BUILT
  if (cudaDriverGetVersion(&version) != cudaSuccess) version = 0;
#endif
  return version;
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
  m.impl("cuda_driver", TORCH_BOX(&saft::cuda_driver));
  m.impl("cpu_isas", TORCH_BOX(&saft::cpu_isas));
  m.impl("cpu_isa", TORCH_BOX(&saft::cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&saft::set_cpu_isa));
}
