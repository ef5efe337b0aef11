// The middle one of accumulate_topk's three kernels, and all of compact_topk. See settle_topk_kernel.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "../ops/jobs.h"

namespace saft::cuda {

// Takes in what a scan has found, raises the threshold, and leaves at most `limit` >= k candidates; where they do not
// fit it leaves room for those of the scanned tensor and asks for a refill. Without a tensor, scan.n is 0.
cudaError_t launch_settle_topk(const Scan& scan, const TopkBuffer& buffer, int64_t limit, cudaStream_t stream);

}  // namespace saft::cuda
