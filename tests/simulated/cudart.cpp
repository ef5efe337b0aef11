// A CUDA runtime without a GPU: as much of it as launching kernels takes. Launches go to a function of the test
// process, which runs the kernel's PTX (see __init__.py).
//
// nvcc's host code registers every kernel under the address of its host stub; a launch names the stub.

#include <cuda_runtime_api.h>

#include <map>
#include <string>
#include <vector>

namespace {

using Launch = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, void** arguments,
                       unsigned shared_bytes);

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

Launch launch = nullptr;
cudaError_t last_error = cudaSuccess;
std::vector<Configuration> configurations;

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}

cudaError_t run(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_bytes) {
  const unsigned grid_size[] = {grid.x, grid.y, grid.z}, block_size[] = {block.x, block.y, block.z};
  const auto kernel = kernels().find(stub);
  if (!launch || kernel == kernels().end()) return last_error = cudaErrorInvalidDeviceFunction;
  if (launch(kernel->second.c_str(), grid_size, block_size, arguments, static_cast<unsigned>(shared_bytes)) != 0)
    last_error = cudaErrorLaunchFailure;
  return last_error;
}

}  // namespace

extern "C" {

[[gnu::visibility("default")]] void saft_simulated_launch_with(Launch function) {
  launch = function;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[stub] = name;
}

// Headers of the toolkit define variables that no kernel here uses; those in the PTX belong to the simulator.
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
  configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  const Configuration& last = configurations.back();
  *grid = last.grid;
  *block = last.block;
  *shared_bytes = last.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  configurations.pop_back();
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                               cudaStream_t) {
  return run(kernel, grid, block, arguments, shared_bytes);
}

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  return run(stub, grid, block, arguments, shared_bytes);
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "the simulated kernel failed" : "the simulated launch was refused";
}

}  // extern "C"
