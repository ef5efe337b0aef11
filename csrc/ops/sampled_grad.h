// sampled_grad: the weight gradient of a linear layer at selected entries only, without the dense one.
//
//   pack_columns(x [T, I], columns [C], dtype) -> packed [ceil(T / 16), C, 16]
//   sampled_grad(packed, grad_output [T, O], rows [R], offsets [R + 1], columns [n], product) -> [n]
//   sampled_embedding_grad(tokens [T], grad_output [T, E], rows [R], offsets [R + 1], columns [n]) -> [n]
//
// For y = x W^T + b with W [O, I], entry e in row j of the plan (offsets[j] <= e < offsets[j + 1]) is
//
//   grad[e] = sum over t of grad_output[t, rows[j]] * x[t, c],   c = the columns[e]-th packed column
//
// and for y[t] = W[tokens[t]], whose input is one-hot and is never made,
//
//   grad[e] = sum over t with tokens[t] = rows[j] of grad_output[t, columns[e]]
//
// Contract
// - pack_columns keeps what backward needs of x: the columns that some selected entry uses, 16 tokens of a column side
//   by side, the last block filled with zeros. Column I, one past the last, is a column of ones: an entry that uses it
//   gets the gradient of the bias.
// - x, packed and grad_output: one dtype, fp32, bf16, fp16 or fp64. x and grad_output: any strides. An fp32 x may be
//   packed as bf16 or fp16, rounded to nearest even: autocast's rounding, without a pass of its own.
// - rows and the columns to be packed: int32, strictly increasing. columns: int32, within [0, C). offsets: int32, from
//   0 to n, not decreasing. All are checked before anything is read (on a GPU by the caller:
//   saft_kernels/index_values.py).
// - grad is fp32 (fp64 for fp64), products and sums too. Deterministic: the order of a sum depends on the sizes alone,
//   never on threads, instruction sets or the GPU, but within an instruction of its tensor cores (`product` in bf16 and
//   fp16), which is the hardware's. On the CPU lane l of 16 sums the tokens t = l mod 16 in order, then the lanes are
//   added pairwise.
// - product: entries share rows and columns so often that tiles of the product over the used rows and columns are the
//   faster way (saft_kernels/cost_model.py). A matter of speed and of the order of sums only; the CPU has one way.
// - tokens: int64; one that is no row of the plan, negative ones included, has no part. Its columns lie within [0, E).
//   The CPU sums an entry's tokens in order, GPUs in a fixed tree over them.
#pragma once

#include <optional>

#include "checks.h"
#include "jobs.h"

namespace saft {

// How many blocks of kTokens hold `tokens`.
int64_t blocks_of(int64_t tokens);

// The type in which products of `type` are summed.
ScalarType sum_type(FloatType type);

// What pack_columns returns.
ScalarType packed_type(const Tensor& x, std::optional<ScalarType> dtype);

// The values of rows, offsets and columns are not checked yet; outputs are null.
PackColumns check_pack_columns(const Tensor& x, const Tensor& columns, std::optional<ScalarType> dtype, Device device);
SampledGrad check_sampled_grad(const Tensor& packed, const Tensor& grad_output, const Tensor& rows,
                               const Tensor& offsets, const Tensor& columns, Device device);
SampledEmbeddingGrad check_sampled_embedding_grad(const Tensor& tokens, const Tensor& grad_output, const Tensor& rows,
                                                  const Tensor& offsets, const Tensor& columns, Device device);

}  // namespace saft
