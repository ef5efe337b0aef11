// gather:   values[i] = dense[index[i]]
// scatter:  dense[index[i]] = values[i]
//
// An entry moves a sector of `dense` (32 bytes, read; for scatter written too), its index (4 or 8) and its value. The
// sectors lie apart, so the time is that of the memory's latency until enough of them are under way: a thread takes
// four entries, whose indices are one 16-byte load and whose sectors it asks for before it uses any.

#include "gather_scatter_kernel.h"
#include "numbers.cuh"
#include "vectors.cuh"

namespace saft::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, typename Index, bool scatter>
__global__ void __launch_bounds__(kThreads)
    move_kernel(T* __restrict__ dense, T* __restrict__ values, const Index* __restrict__ indices, int64_t n,
                const __grid_constant__ Strided layout) {
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kEntries;
  if (first >= n) return;
  const int count = entries_from(first, n);
  Index index[kEntries];
  load_entries(indices, first, count, index);
  int64_t place[kEntries];
#pragma unroll
  for (int i = 0; i < kEntries; ++i) place[i] = place_of(layout, index[i]);
  T value[kEntries];
  if constexpr (scatter) load_entries(values, first, count, value);
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    if (i >= count) break;
    if constexpr (scatter)
      dense[place[i]] = value[i];
    else
      value[i] = dense[place[i]];
  }
  if constexpr (!scatter) store_entries(values, first, count, value);
}

template <typename T, typename Index, bool scatter>
cudaError_t launch(const GatherScatter& job, cudaStream_t stream) {
  const int64_t n = job.indices.n;
  if (n == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(ceil_div(n, kThreads * kEntries));
  move_kernel<T, Index, scatter>
      <<<blocks, kThreads, 0, stream>>>(static_cast<T*>(job.dense), static_cast<T*>(job.values),
                                        static_cast<const Index*>(job.indices.data), n, job.layout);
  return cudaGetLastError();
}

template <typename T, bool scatter>
cudaError_t launch_indexed(const GatherScatter& job, cudaStream_t stream) {
  return job.indices.wide ? launch<T, int64_t, scatter>(job, stream) : launch<T, int32_t, scatter>(job, stream);
}

template <bool scatter>
cudaError_t launch_sized(const GatherScatter& job, cudaStream_t stream) {
  switch (job.element_size) {
    case 1:
      return launch_indexed<uint8_t, scatter>(job, stream);
    case 2:
      return launch_indexed<uint16_t, scatter>(job, stream);
    case 4:
      return launch_indexed<uint32_t, scatter>(job, stream);
    default:
      return launch_indexed<uint64_t, scatter>(job, stream);
  }
}

}  // namespace

cudaError_t launch_gather(const GatherScatter& job, cudaStream_t stream) {
  return launch_sized<false>(job, stream);
}

cudaError_t launch_scatter(const GatherScatter& job, cudaStream_t stream) {
  return launch_sized<true>(job, stream);
}

}  // namespace saft::cuda
