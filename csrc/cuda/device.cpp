#include "device.h"

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

namespace saft::cuda {
namespace {

// The stream of torch's CUDA library. It is looked up when it is needed, since a torch without CUDA, in which this
// library must load as well, does not have it.
cudaStream_t current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(get != nullptr, "this torch has no CUDA support, although its tensors are on a GPU");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace

Call::Call(const Tensor& tensor, const char* name) : device_(Device::of(tensor)) {
  STD_TORCH_CHECK(device_.type == DeviceType::CUDA, name, " must be on the GPU, like the other arguments");
  guard_.emplace(device_.index);
  stream_ = current_stream(device_.index);
}

Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

void check(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status));
}

}  // namespace saft::cuda
