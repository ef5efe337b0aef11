// What the CUDA backend needs of torch: the GPU of a call, its current stream, memory for results.
//
// Kernels and launchers (cuda/*_kernel.cu) see none of this: they take plain pointers and a stream. This is the only
// file of the backend with a second implementation (tests/simulated/device.cpp), under which the same launchers run
// without a GPU.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "../ops/checks.h"

// The library and the dispatch key that the operations are registered for.
#ifndef SAFT_GPU_LIBRARY
#define SAFT_GPU_LIBRARY saft_kernels
#define SAFT_GPU_KEY CUDA
#endif

namespace saft::cuda {

// While it lives, the GPU of `tensor` is the current one, and work goes to its current stream: never to the null stream
// by accident.
class Call {
 public:
  explicit Call(const Tensor& tensor, const char* name);
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  Device device() const { return device_; }
  cudaStream_t stream() const { return stream_; }

 private:
  Device device_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;  // owned: the constructor may throw
  cudaStream_t stream_ = nullptr;
};

// Memory from torch's caching allocator, on the GPU of `like`; its contents are undefined.
Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type);

// Throws if a launch was refused.
void check(cudaError_t status);

}  // namespace saft::cuda
