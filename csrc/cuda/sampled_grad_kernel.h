// Launchers of pack_columns, sampled_grad and sampled_embedding_grad. See ops/sampled_grad.h for the operations.
#pragma once

#include <cuda_runtime_api.h>

#include "../ops/jobs.h"

namespace saft::cuda {

// How a gradient is computed: entry by entry or as a product over the used rows and columns, and in how many parts of
// the tokens. The same on every GPU, so that the bits are.
struct SampledStrategy {
  bool product;
  int parts;
};

SampledStrategy strategy_of(const SampledGrad& job);

cudaError_t launch_pack_columns(const PackColumns& job, cudaStream_t stream);

// partial: [parts, n] of the type of grad; not used if there is one part.
cudaError_t launch_sampled_grad(const SampledGrad& job, SampledStrategy strategy, void* partial, cudaStream_t stream);

// found: int32 [tokens], the number of each token's row in the plan, or n_rows if it has none.
cudaError_t launch_find_rows(const SampledEmbeddingGrad& job, int32_t* found, cudaStream_t stream);

// found, sorted, and the tokens in that order: int64 [tokens].
cudaError_t launch_sampled_embedding_grad(const SampledEmbeddingGrad& job, const int32_t* found, const int64_t* order,
                                          cudaStream_t stream);

}  // namespace saft::cuda
