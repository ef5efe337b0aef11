// Launchers of accumulate_topk_ and compact_topk_. See ops/accumulate_topk.h for the operations.
#pragma once

#include <cuda_runtime_api.h>

#include "../ops/jobs.h"

namespace saft::cuda {

cudaError_t launch_accumulate_topk(const Scan& scan, const TopkBuffer& buffer, cudaStream_t stream);
cudaError_t launch_compact_topk(const TopkBuffer& buffer, cudaStream_t stream);

}  // namespace saft::cuda
