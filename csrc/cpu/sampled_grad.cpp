#include "../ops/sampled_grad.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "index_values.h"
#include "numbers.h"
#include "sampled_grad_kernel.h"

namespace saft::cpu {
namespace {

constexpr int64_t kEntriesPerTask = 4096;  // whose sums fit into a part of an L2 cache
constexpr int64_t kBlocksPerTask = 8;      // token blocks that are packed at a time

void require_increasing(const int32_t* indices, int64_t n, int64_t limit, const char* name, const char* of) {
  require_increase_below({indices, false, n}, limit, name, of);
}

Tensor pack_columns(const Tensor& x, const Tensor& columns, std::optional<ScalarType> dtype) {
  PackColumns job = check_pack_columns(x, columns, dtype, kCpu);
  require_increasing(job.columns, job.n_columns, job.x.width + 1, "columns", "columns of x, that of ones included");
  const int64_t blocks = blocks_of(job.x.tokens);
  Tensor packed = torch::stable::new_empty(x, {blocks, job.n_columns, kTokens}, packed_type(x, dtype));
  job.packed = packed.mutable_data_ptr();
  torch::stable::parallel_for(0, blocks, kBlocksPerTask,
                              [&](int64_t begin, int64_t end) { sampled_grad_kernels().pack(job, begin, end); });
  return packed;
}

// Rows at which tasks begin, and the last. Every task reads the whole packed input, so there are no more of them than
// threads, unless their sums would not stay in the cache.
std::vector<int64_t> tasks_of(const RowPlan& plan) {
  const int64_t share = plan.n / static_cast<int64_t>(torch::stable::get_num_threads()) + 1;
  const int64_t size = std::min(kEntriesPerTask, std::max<int64_t>(share, 64));
  std::vector<int64_t> begins{0};
  for (int64_t row = 1; row < plan.n_rows; ++row)
    if (plan.offsets[row] - plan.offsets[begins.back()] >= size) begins.push_back(row);
  if (plan.n_rows > 0) begins.push_back(plan.n_rows);
  return begins;
}

Tensor sampled_grad(const Tensor& packed, const Tensor& grad_output, const Tensor& rows, const Tensor& offsets,
                    const Tensor& columns, bool /*product*/) {
  SampledGrad job = check_sampled_grad(packed, grad_output, rows, offsets, columns, kCpu);
  const RowPlan& plan = job.plan;
  require_increasing(plan.rows, plan.n_rows, job.grad_output.width, "rows", "columns of grad_output");
  require_offsets(plan.offsets, plan.n_rows, plan.n);
  require_columns(plan.columns, plan.n, job.n_columns, "packed columns");
  Tensor grad = torch::stable::new_empty(grad_output, {plan.n}, sum_type(job.grad_output.type));
  job.grad = grad.mutable_data_ptr();
  const std::vector<int64_t> begins = tasks_of(plan);
  const auto tasks = static_cast<int64_t>(begins.size()) - 1;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> sums;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t entries = plan.offsets[begins[task + 1]] - plan.offsets[begins[task]];
      sums.resize(std::max<size_t>(sums.size(), entries * kTokens));
      sampled_grad_kernels().grad(job, begins[task], begins[task + 1], sums.data());
    }
  });
  return grad;
}

// The plan's row of every token, or -1.
std::vector<int32_t> rows_of(const SampledEmbeddingGrad& job) {
  const int32_t *first = job.plan.rows, *last = first + job.plan.n_rows;
  const int64_t count = job.grad_output.tokens;
  std::vector<int32_t> found(count);
  torch::stable::parallel_for(0, count, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* row = std::lower_bound(first, last, job.tokens[t]);
      found[t] = row != last && *row == job.tokens[t] ? static_cast<int32_t>(row - first) : -1;
    }
  });
  return found;
}

template <typename T, typename S>
void add_tokens(const SampledEmbeddingGrad& job, S* grad) {
  const TokenMajor& dy = job.grad_output;
  const std::vector<int32_t> rows = rows_of(job);
  const T* data = static_cast<const T*>(dy.data);
  for (int64_t t = 0; t < dy.tokens; ++t) {
    if (rows[t] < 0) continue;
    const T* from = data + t * dy.token_stride;
    for (int64_t e = job.plan.offsets[rows[t]]; e < job.plan.offsets[rows[t] + 1]; ++e)
      grad[e] += static_cast<S>(to_float(from[job.plan.columns[e] * dy.column_stride]));
  }
}

Tensor sampled_embedding_grad(const Tensor& tokens, const Tensor& grad_output, const Tensor& rows,
                              const Tensor& offsets, const Tensor& columns) {
  const SampledEmbeddingGrad job = check_sampled_embedding_grad(tokens, grad_output, rows, offsets, columns, kCpu);
  const RowPlan& plan = job.plan;
  require_increasing(plan.rows, plan.n_rows, std::numeric_limits<int32_t>::max(), "rows",
                     "rows that an embedding may have");
  require_offsets(plan.offsets, plan.n_rows, plan.n);
  require_columns(plan.columns, plan.n, job.grad_output.width, "columns of grad_output");
  Tensor grad = torch::stable::new_zeros(grad_output, {plan.n}, sum_type(job.grad_output.type));
  void* sums = grad.mutable_data_ptr();
  switch (job.grad_output.type) {
    case FloatType::bf16:
      add_tokens<BFloat16>(job, static_cast<float*>(sums));
      break;
    case FloatType::fp16:
      add_tokens<Half>(job, static_cast<float*>(sums));
      break;
    case FloatType::fp64:
      add_tokens<double>(job, static_cast<double*>(sums));
      break;
    default:
      add_tokens<float>(job, static_cast<float*>(sums));
      break;
  }
  return grad;
}

}  // namespace
}  // namespace saft::cpu

STABLE_TORCH_LIBRARY_IMPL(saft_kernels, CPU, m) {
  m.impl("pack_columns", TORCH_BOX(&saft::cpu::pack_columns));
  m.impl("sampled_grad", TORCH_BOX(&saft::cpu::sampled_grad));
  m.impl("sampled_embedding_grad", TORCH_BOX(&saft::cpu::sampled_embedding_grad));
}
