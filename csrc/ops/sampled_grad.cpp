#include "sampled_grad.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../cpu/numbers.h"
#include "../cpu/sampled_grad_kernel.h"
#include "indices.h"

namespace saft {
namespace {

using cpu::kTokens;

constexpr int64_t kEntriesPerTask = 4096;  // whose sums fit into a part of an L2 cache
constexpr int64_t kBlocksPerTask = 8;      // token blocks that are packed at a time

cpu::FloatType float_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return cpu::FloatType::fp32;
    case ScalarType::BFloat16:
      return cpu::FloatType::bf16;
    case ScalarType::Half:
      return cpu::FloatType::fp16;
    case ScalarType::Double:
      return cpu::FloatType::fp64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64, not ",
                      name_of(tensor.scalar_type()));
  }
}

cpu::TokenMajor token_major(const Tensor& matrix, const char* name) {
  check_cpu(matrix, name);
  STD_TORCH_CHECK(matrix.dim() == 2, name, " must have two dimensions, tokens and columns, not ", matrix.dim());
  return {matrix.const_data_ptr(), float_type(matrix, name), matrix.size(0), matrix.stride(0), matrix.stride(1)};
}

int64_t blocks_of(int64_t tokens) {
  return (tokens + kTokens - 1) / kTokens;
}

const int32_t* increasing_int32(const Tensor& indices, int64_t below, const char* name) {
  check_dtype(indices, ScalarType::Int, name);
  return static_cast<const int32_t*>(indices_of(indices, below, name).data);
}

Tensor pack_columns(const Tensor& x, const Tensor& columns) {
  const cpu::TokenMajor tokens = token_major(x, "x");
  const int64_t width = x.size(1);
  const int32_t* chosen = increasing_int32(columns, width + 1, "columns");
  const int64_t blocks = blocks_of(tokens.tokens);
  Tensor packed = torch::stable::new_empty(x, {blocks, columns.numel(), kTokens});
  const cpu::PackColumns job{tokens, width, chosen, columns.numel(), packed.mutable_data_ptr()};
  torch::stable::parallel_for(0, blocks, kBlocksPerTask,
                              [&](int64_t begin, int64_t end) { cpu::sampled_grad_kernels().pack(job, begin, end); });
  return packed;
}

void check_packed(const Tensor& packed, const Tensor& grad_output) {
  check_cpu(packed, "packed");
  check_dtype(packed, grad_output.scalar_type(), "packed");
  STD_TORCH_CHECK(packed.dim() == 3 && packed.is_contiguous() && packed.size(2) == kTokens &&
                      packed.size(0) == blocks_of(grad_output.size(0)),
                  "packed must be what pack_columns made of an input with the ", grad_output.size(0),
                  " tokens of the gradient");
}

void check_offsets(const Tensor& offsets, int64_t rows, int64_t n) {
  check_vector(offsets, ScalarType::Int, "offsets");
  const int32_t* values = offsets.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(
      offsets.numel() == rows + 1 && values[0] == 0 && values[rows] == n && std::is_sorted(values, values + rows + 1),
      "offsets must rise from 0 to the number of entries, ", n, ", in ", rows + 1, " values");
}

void check_columns(const Tensor& columns, int64_t packed) {
  check_vector(columns, ScalarType::Int, "columns");
  const int32_t* values = columns.const_data_ptr<int32_t>();
  uint32_t largest = 0;  // of unsigned values, so that negative ones are too large
  for (int64_t e = 0; e < columns.numel(); ++e) largest = std::max(largest, static_cast<uint32_t>(values[e]));
  STD_TORCH_CHECK(columns.numel() == 0 || largest < packed, "columns must lie within the ", packed, " packed columns");
}

// Rows at which tasks begin, and the last. Every task reads the whole packed input, so there are no more of them than
// threads, unless their sums would not stay in the cache.
std::vector<int64_t> tasks_of(const int32_t* offsets, int64_t rows) {
  const int64_t n = offsets[rows];
  const int64_t share = n / static_cast<int64_t>(torch::stable::get_num_threads()) + 1;
  const int64_t size = std::min(kEntriesPerTask, std::max<int64_t>(share, 64));
  std::vector<int64_t> begins{0};
  for (int64_t row = 1; row < rows; ++row)
    if (offsets[row] - offsets[begins.back()] >= size) begins.push_back(row);
  if (rows > 0) begins.push_back(rows);
  return begins;
}

Tensor sampled_grad(const Tensor& packed, const Tensor& grad_output, const Tensor& rows, const Tensor& offsets,
                    const Tensor& columns) {
  const cpu::TokenMajor dy = token_major(grad_output, "grad_output");
  check_packed(packed, grad_output);
  const int32_t* chosen = increasing_int32(rows, grad_output.size(1), "rows");
  const int64_t n = columns.numel();
  check_offsets(offsets, rows.numel(), n);
  check_columns(columns, packed.size(1));
  const bool wide = dy.type == cpu::FloatType::fp64;
  Tensor grad = torch::stable::new_empty(grad_output, {n}, wide ? ScalarType::Double : ScalarType::Float);
  const cpu::SampledGrad job{dy,
                             packed.const_data_ptr(),
                             packed.size(1),
                             chosen,
                             offsets.const_data_ptr<int32_t>(),
                             columns.const_data_ptr<int32_t>(),
                             grad.mutable_data_ptr()};
  const std::vector<int64_t> begins = tasks_of(job.offsets, rows.numel());
  const auto tasks = static_cast<int64_t>(begins.size()) - 1;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> sums;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t entries = job.offsets[begins[task + 1]] - job.offsets[begins[task]];
      sums.resize(std::max<size_t>(sums.size(), entries * kTokens));
      cpu::sampled_grad_kernels().grad(job, begins[task], begins[task + 1], sums.data());
    }
  });
  return grad;
}

// The plan's row of every token, or -1.
std::vector<int32_t> rows_of(const int64_t* tokens, int64_t count, const int32_t* rows, int64_t n_rows) {
  std::vector<int32_t> found(count);
  torch::stable::parallel_for(0, count, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* row = std::lower_bound(rows, rows + n_rows, tokens[t]);
      found[t] = row != rows + n_rows && *row == tokens[t] ? static_cast<int32_t>(row - rows) : -1;
    }
  });
  return found;
}

struct EmbeddingGrad {
  cpu::TokenMajor dy;
  std::vector<int32_t> rows;  // of each token
  const int32_t* offsets;
  const int32_t* columns;
};

template <typename T, typename S>
void add_tokens(const EmbeddingGrad& job, S* grad) {
  const T* dy = static_cast<const T*>(job.dy.data);
  for (int64_t t = 0; t < job.dy.tokens; ++t) {
    if (job.rows[t] < 0) continue;
    const T* from = dy + t * job.dy.token_stride;
    for (int64_t e = job.offsets[job.rows[t]]; e < job.offsets[job.rows[t] + 1]; ++e)
      grad[e] += static_cast<S>(cpu::to_float(from[job.columns[e] * job.dy.column_stride]));
  }
}

Tensor sampled_embedding_grad(const Tensor& tokens, const Tensor& grad_output, const Tensor& rows,
                              const Tensor& offsets, const Tensor& columns) {
  const cpu::TokenMajor dy = token_major(grad_output, "grad_output");
  check_vector(tokens, ScalarType::Long, "tokens");
  STD_TORCH_CHECK(tokens.numel() == dy.tokens, "there must be one token per row of grad_output: ", dy.tokens, ", not ",
                  tokens.numel());
  const int32_t* chosen = increasing_int32(rows, std::numeric_limits<int32_t>::max(), "rows");
  const int64_t n = columns.numel();
  check_offsets(offsets, rows.numel(), n);
  check_columns(columns, grad_output.size(1));
  const bool wide = dy.type == cpu::FloatType::fp64;
  Tensor grad = torch::stable::new_zeros(grad_output, {n}, wide ? ScalarType::Double : ScalarType::Float);
  const EmbeddingGrad job{dy, rows_of(tokens.const_data_ptr<int64_t>(), dy.tokens, chosen, rows.numel()),
                          offsets.const_data_ptr<int32_t>(), columns.const_data_ptr<int32_t>()};
  void* sums = grad.mutable_data_ptr();
  switch (dy.type) {
    case cpu::FloatType::fp32:
      add_tokens<float>(job, static_cast<float*>(sums));
      break;
    case cpu::FloatType::bf16:
      add_tokens<cpu::BFloat16>(job, static_cast<float*>(sums));
      break;
    case cpu::FloatType::fp16:
      add_tokens<cpu::Half>(job, static_cast<float*>(sums));
      break;
    case cpu::FloatType::fp64:
      add_tokens<double>(job, static_cast<double*>(sums));
      break;
  }
  return grad;
}

}  // namespace
}  // namespace saft

STABLE_TORCH_LIBRARY_IMPL(saft_kernels, CPU, m) {
  m.impl("pack_columns", TORCH_BOX(&saft::pack_columns));
  m.impl("sampled_grad", TORCH_BOX(&saft::sampled_grad));
  m.impl("sampled_embedding_grad", TORCH_BOX(&saft::sampled_embedding_grad));
}
