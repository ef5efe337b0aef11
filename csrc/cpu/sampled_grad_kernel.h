// The inner loops of pack_columns and sampled_grad. See ops/sampled_grad.h for the operations.
#pragma once

#include <cstdint>

#include "isa.h"

namespace saft::cpu {

enum class FloatType { fp32, bf16, fp16, fp64 };

// Tokens of a column that lie side by side.
constexpr int64_t kTokens = 16;

// A matrix of `tokens` rows, element (t, i) at data[t * token_stride + i * column_stride].
struct TokenMajor {
  const void* data;
  FloatType type;
  int64_t tokens;
  int64_t token_stride;
  int64_t column_stride;
};

struct PackColumns {
  TokenMajor x;
  int64_t width;  // I: as a column it stands for ones
  const int32_t* columns;
  int64_t n_columns;
  void* packed;
};

struct SampledGrad {
  TokenMajor grad_output;
  const void* packed;
  int64_t n_columns;
  const int32_t* rows;
  const int32_t* offsets;
  const int32_t* columns;
  void* grad;
};

struct SampledGradKernels {
  // Packs token blocks [begin, end).
  void (*pack)(const PackColumns& job, int64_t begin, int64_t end);
  // The gradient of the entries in rows [begin, end); sums: kTokens numbers of the type of grad for each of them.
  void (*grad)(const SampledGrad& job, int64_t begin, int64_t end, void* sums);
};

SAFT_DECLARE_KERNELS(SampledGradKernels, sampled_grad)

}  // namespace saft::cpu
