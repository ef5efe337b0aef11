// Launchers of gather and scatter_. See ops/gather_scatter.h for the operations.
#pragma once

#include <cuda_runtime_api.h>

#include "../ops/jobs.h"

namespace saft::cuda {

cudaError_t launch_gather(const GatherScatter& job, cudaStream_t stream);
cudaError_t launch_scatter(const GatherScatter& job, cudaStream_t stream);

}  // namespace saft::cuda
