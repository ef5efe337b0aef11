// gather:   values[i] = dense[index[i]]
// scatter:  dense[index[i]] = values[i]
//
// Each entry costs a cache line of `dense`, and a page-table walk when the entries are far apart: latency, not
// bandwidth, is the limit. So the lines of one block are requested while the block before it is being moved.

#include "gather_scatter_kernel.h"

#include "strided.h"

namespace saft::cpu {
namespace {

constexpr int64_t kBlock = 256;

template <typename T, bool scatter>
void move_block(T* dense, T* values, const int64_t* places, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (scatter)
      dense[places[i]] = values[i];
    else
      values[i] = dense[places[i]];
  }
}

template <typename T, bool scatter>
int64_t request_block(const GatherScatter& job, int64_t begin, int64_t end, int64_t* places) {
  const int64_t n = end - begin < kBlock ? end - begin : kBlock;
  if (n <= 0) return 0;
  load_places(job.indices, job.layout, begin, n, places);
  const T* dense = static_cast<const T*>(job.dense);
  in_page_order(n, [=](int64_t i) { __builtin_prefetch(dense + places[i], scatter); });
  return n;
}

template <typename T, bool scatter>
void move(const GatherScatter& job, int64_t begin, int64_t end) {
  T* dense = static_cast<T*>(job.dense);
  T* values = static_cast<T*>(job.values);
  int64_t places[2][kBlock];
  int64_t n = request_block<T, scatter>(job, begin, end, places[0]);
  for (int current = 0; n > 0; current ^= 1) {
    const int64_t next = request_block<T, scatter>(job, begin + n, end, places[current ^ 1]);
    move_block<T, scatter>(dense, values + begin, places[current], n);
    begin += n;
    n = next;
  }
}

template <bool scatter>
void dispatch(const GatherScatter& job, int64_t begin, int64_t end) {
  switch (job.element_size) {
    case 1:
      return move<uint8_t, scatter>(job, begin, end);
    case 2:
      return move<uint16_t, scatter>(job, begin, end);
    case 4:
      return move<uint32_t, scatter>(job, begin, end);
    default:
      return move<uint64_t, scatter>(job, begin, end);
  }
}

}  // namespace

namespace SAFT_CPU_ISA {
extern const GatherScatterKernels gather_scatter;
const GatherScatterKernels gather_scatter = {dispatch<false>, dispatch<true>};
}  // namespace SAFT_CPU_ISA

}  // namespace saft::cpu
