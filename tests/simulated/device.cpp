// csrc/cuda/device.h on a simulated GPU: its memory is the CPU's, what is allocated on it is poisoned, and every memory
// range that an operation may touch is recorded, so that the simulator can tell an access that leaves it.

#include "../../csrc/cuda/device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

namespace {

struct Range {
  uint64_t address, bytes;
};

// What the call under way has taken the address of.
std::vector<Range> ranges;

void record(AtenTensorHandle handle, const void* data) {
  AtenTensorHandle copy = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &copy));
  const torch::stable::Tensor tensor(copy);
  if (tensor.numel() == 0) return;
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  ranges.push_back({reinterpret_cast<uint64_t>(data), static_cast<uint64_t>((last + 1) * tensor.element_size())});
}

}  // namespace

// The linker sends all calls of the functions without __wrap_ here (--wrap).
extern "C" {

AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data);
AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data);

AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, data);
  record(tensor, *data);
  return error;
}

AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, data);
  record(tensor, *data);
  return error;
}

// The ranges that the call under way may touch; returns how many.
[[gnu::visibility("default")]] int64_t saft_simulated_ranges(const Range** first) {
  *first = ranges.data();
  return static_cast<int64_t>(ranges.size());
}

}  // extern "C"

namespace saft::cuda {

Call::Call(const Tensor& tensor, const char* name) : device_(kCpu) {
  check_device(tensor, kCpu, name);
  ranges.clear();
}

Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  constexpr int kPoison = 0xff;  // NaN in every floating type, -1 in every integer
  const Tensor tensor = torch::stable::new_empty(like, sizes, type);
  const size_t bytes = tensor.numel() * tensor.element_size();
  if (bytes > 0) std::memset(tensor.mutable_data_ptr(), kPoison, bytes);
  return tensor;
}

void check(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status));
}

}  // namespace saft::cuda
