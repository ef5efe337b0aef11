#include "sampled_grad.h"

#include "indices.h"

namespace saft {
namespace {

TokenMajor token_major(const Tensor& matrix, Device device, const char* name) {
  check_device(matrix, device, name);
  STD_TORCH_CHECK(matrix.dim() == 2, name, " must have two dimensions, tokens and columns, not ", matrix.dim());
  return {matrix.const_data_ptr(), float_type(matrix, name), matrix.size(0),
          matrix.size(1),          matrix.stride(0),         matrix.stride(1)};
}

RowPlan row_plan(const Tensor& rows, const Tensor& offsets, const Tensor& columns, Device device) {
  const RowPlan plan{int32_vector(rows, device, "rows"), int32_vector(offsets, device, "offsets"),
                     int32_vector(columns, device, "columns"), rows.numel(), columns.numel()};
  STD_TORCH_CHECK(offsets.numel() == plan.n_rows + 1, "offsets must rise from 0 to the number of entries, ", plan.n,
                  ", in ", plan.n_rows + 1, " values");
  return plan;
}

FloatType packed_float_type(const Tensor& x, ScalarType packed) {
  if (packed == x.scalar_type()) return float_type(x, "x");
  STD_TORCH_CHECK(
      x.scalar_type() == ScalarType::Float && (packed == ScalarType::BFloat16 || packed == ScalarType::Half), "x of ",
      name_of(x.scalar_type()), " cannot be packed as ", name_of(packed));
  return packed == ScalarType::BFloat16 ? FloatType::bf16 : FloatType::fp16;
}

// To 16 bytes, as memory that torch allocates is: kernels load columns as such pieces.
bool is_aligned(const Tensor& packed) {
  return reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0;
}

}  // namespace

int64_t blocks_of(int64_t tokens) {
  return (tokens + kTokens - 1) / kTokens;
}

PackColumns check_pack_columns(const Tensor& x, const Tensor& columns, std::optional<ScalarType> dtype, Device device) {
  const TokenMajor matrix = token_major(x, device, "x");
  return {matrix, int32_vector(columns, device, "columns"), columns.numel(),
          packed_float_type(x, packed_type(x, dtype)), nullptr};
}

SampledGrad check_sampled_grad(const Tensor& packed, const Tensor& grad_output, const Tensor& rows,
                               const Tensor& offsets, const Tensor& columns, Device device) {
  const TokenMajor dy = token_major(grad_output, device, "grad_output");
  check_device(packed, device, "packed");
  check_dtype(packed, grad_output.scalar_type(), "packed");
  STD_TORCH_CHECK(packed.dim() == 3 && packed.is_contiguous() && packed.size(2) == kTokens &&
                      packed.size(0) == blocks_of(dy.tokens) && is_aligned(packed),
                  "packed must be what pack_columns made of an input with the ", dy.tokens, " tokens of the gradient");
  return {dy, packed.const_data_ptr(), packed.size(1), row_plan(rows, offsets, columns, device), nullptr};
}

SampledEmbeddingGrad check_sampled_embedding_grad(const Tensor& tokens, const Tensor& grad_output, const Tensor& rows,
                                                  const Tensor& offsets, const Tensor& columns, Device device) {
  const TokenMajor dy = token_major(grad_output, device, "grad_output");
  check_vector(tokens, device, ScalarType::Long, "tokens");
  STD_TORCH_CHECK(tokens.numel() == dy.tokens, "there must be one token per row of grad_output: ", dy.tokens, ", not ",
                  tokens.numel());
  return {dy, tokens.const_data_ptr<int64_t>(), row_plan(rows, offsets, columns, device), nullptr};
}

ScalarType sum_type(FloatType type) {
  return type == FloatType::fp64 ? ScalarType::Double : ScalarType::Float;
}

ScalarType packed_type(const Tensor& x, std::optional<ScalarType> dtype) {
  return dtype.value_or(x.scalar_type());
}

}  // namespace saft
