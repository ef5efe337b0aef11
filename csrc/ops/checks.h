// Argument checks shared by the operations. They run once, in front of the kernels, which assume them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "jobs.h"

namespace saft {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType type) {
  return torch::headeronly::toString(type);
}

inline void check_dtype(const Tensor& tensor, ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must be ", name_of(type), ", not ",
                  name_of(tensor.scalar_type()));
}

// The device that all tensors of a call share.
struct Device {
  DeviceType type;
  int32_t index;  // 0 for the CPU

  static Device of(const Tensor& tensor) {
    const DeviceType type = tensor.device().type();
    return {type, type == DeviceType::CPU ? 0 : tensor.get_device_index()};
  }

  bool holds(const Tensor& tensor) const {
    const Device other = of(tensor);
    return type == other.type && index == other.index;
  }
};

constexpr Device kCpu{DeviceType::CPU, 0};

inline void check_device(const Tensor& tensor, Device device, const char* name) {
  STD_TORCH_CHECK(
      device.holds(tensor), name, " must be on ",
      device.type == DeviceType::CPU ? "the CPU, like the other arguments" : "the same GPU as the other arguments");
}

// A contiguous vector of `type`.
inline void check_vector(const Tensor& tensor, Device device, ScalarType type, const char* name) {
  check_device(tensor, device, name);
  check_dtype(tensor, type, name);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous(), name, " must be a contiguous vector");
}

inline void check_vector(const Tensor& tensor, Device device, ScalarType type, int64_t length, const char* name) {
  check_vector(tensor, device, type, name);
  STD_TORCH_CHECK(tensor.numel() == length, name, " must have ", length, " elements, one per selected entry, not ",
                  tensor.numel());
}

inline FloatType float_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return FloatType::fp32;
    case ScalarType::BFloat16:
      return FloatType::bf16;
    case ScalarType::Half:
      return FloatType::fp16;
    case ScalarType::Double:
      return FloatType::fp64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64, not ",
                      name_of(tensor.scalar_type()));
  }
}

// What weights and their gradients may be.
inline FloatType trainable_type(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  " must be float32, bfloat16 or float16, not ", name_of(type));
  return float_type(tensor, name);
}

}  // namespace saft
