// A CUDA runtime without a GPU: as much of it as launching kernels takes. Launches go to a function of the test
// process, which runs the kernel's PTX (see __init__.py). What every GPU refuses to launch is refused here too.
//
// nvcc's host code registers every kernel under the address of its host stub; a launch names the stub.

#include <cuda_runtime_api.h>

#include <algorithm>
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

// Limits of a launch: of all compute capabilities, but for the last, which is the least of those compiled for (sm_86).
constexpr unsigned kMaxThreads = 1024, kMaxBlockDepth = 64;
constexpr unsigned kMaxGridWidth = 0x7fffffff, kMaxGridHeight = 0xffff;
constexpr size_t kMaxSharedBytes = 48 * 1024;  // unless a kernel was given more
constexpr int kMostSharedBytes = 99 * 1024;

Launch launch = nullptr;
cudaError_t last_error = cudaSuccess;
std::vector<Configuration> configurations;

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}

// How much dynamic shared memory kernels were given (cudaFuncSetAttribute).
std::map<const void*, size_t>& shared_limits() {
  static std::map<const void*, size_t> limits;
  return limits;
}

bool is_empty(dim3 size) {
  return size.x == 0 || size.y == 0 || size.z == 0;
}

// What a real runtime answers before the kernel starts.
cudaError_t check_launch(const void* stub, dim3 grid, dim3 block, size_t shared_bytes) {
  if (is_empty(grid) || is_empty(block)) return cudaErrorInvalidConfiguration;
  if (grid.x > kMaxGridWidth || std::max(grid.y, grid.z) > kMaxGridHeight) return cudaErrorInvalidConfiguration;
  if (block.z > kMaxBlockDepth || uint64_t{block.x} * block.y * block.z > kMaxThreads)
    return cudaErrorInvalidConfiguration;
  const auto given = shared_limits().find(stub);
  const size_t limit = given == shared_limits().end() ? kMaxSharedBytes : given->second;
  return shared_bytes > limit ? cudaErrorInvalidValue : cudaSuccess;
}

cudaError_t run(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_bytes) {
  const unsigned grid_size[] = {grid.x, grid.y, grid.z}, block_size[] = {block.x, block.y, block.z};
  const cudaError_t refusal = check_launch(stub, grid, block, shared_bytes);
  if (refusal != cudaSuccess) return last_error = refusal;
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

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > kMostSharedBytes) return last_error = cudaErrorInvalidValue;
  shared_limits()[stub] = std::max<size_t>(value, kMaxSharedBytes);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorLaunchFailure:
      return "the simulated kernel failed";
    case cudaErrorInvalidConfiguration:
      return "no GPU launches such a grid or such blocks";
    case cudaErrorInvalidValue:
      return "more shared memory than the kernel was given";
    default:
      return "the simulated launch was refused";
  }
}

}  // extern "C"
