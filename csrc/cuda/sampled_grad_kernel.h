// Launchers of pack_columns, sampled_grad and sampled_embedding_grad. See ops/sampled_grad.h for the operations.
#pragma once

#include <cuda_runtime_api.h>

#include "../ops/jobs.h"

namespace saft::cuda {

cudaError_t launch_pack(const PackColumns& job, cudaStream_t stream);

// The tokens in parts that are summed side by side: `count` of them, `blocks` blocks of kTokens each (the last may be
// shorter). They depend on the sizes of the job alone, so that the order of the sums is the same on every GPU.
struct TokenParts {
  int64_t count;
  int64_t blocks;
};

// For work that takes `warps` warps per part.
TokenParts token_parts(int64_t tokens, int64_t warps);

// Entry by entry, or as tiles of the product over the used rows and columns. Both write sums [parts.count, n] to
// job.grad.
TokenParts parts_of_entries(const SampledGrad& job);
TokenParts parts_of_product(const SampledGrad& job);
cudaError_t launch_entries(const SampledGrad& job, TokenParts parts, cudaStream_t stream);
cudaError_t launch_product(const SampledGrad& job, TokenParts parts, cudaStream_t stream);

// grad[e] = the sum of sums[part, e] over the parts, in a fixed order; both of the sums' type for `type`.
cudaError_t launch_sum_parts(FloatType type, const void* sums, int64_t parts, int64_t n, void* grad,
                             cudaStream_t stream);

// found[t] = the row of the plan that token t is, or n_rows.
cudaError_t launch_find_rows(const SampledEmbeddingGrad& job, int32_t* found, cudaStream_t stream);

// found, sorted, and the tokens in that order.
struct SortedTokens {
  const int32_t* rows;
  const int64_t* tokens;
};
cudaError_t launch_sum_tokens(const SampledEmbeddingGrad& job, SortedTokens sorted, cudaStream_t stream);

}  // namespace saft::cuda
