// Argument checks shared by the operations. They run once, in front of the kernels, which assume them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace saft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType type) {
  return torch::headeronly::toString(type);
}

inline void check_dtype(const Tensor& tensor, ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must be ", name_of(type), ", not ",
                  name_of(tensor.scalar_type()));
}

inline void check_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU, like the other arguments");
}

// A contiguous vector of `type` on the CPU.
inline void check_vector(const Tensor& tensor, ScalarType type, const char* name) {
  check_cpu(tensor, name);
  check_dtype(tensor, type, name);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous(), name, " must be a contiguous vector");
}

inline void check_vector(const Tensor& tensor, ScalarType type, int64_t length, const char* name) {
  check_vector(tensor, type, name);
  STD_TORCH_CHECK(tensor.numel() == length, name, " must have ", length, " elements, one per selected entry, not ",
                  tensor.numel());
}

inline bool is_low_precision(ScalarType type) {
  return type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline void check_trainable_dtype(ScalarType type, const char* name) {
  STD_TORCH_CHECK(type == ScalarType::Float || is_low_precision(type), name,
                  " must be float32, bfloat16 or float16, not ", name_of(type));
}

}  // namespace saft
