// Kernels of test_ptxsim_cub.py: block and warp primitives of CUB.
#include <cub/block/block_exchange.cuh>
#include <cub/block/block_histogram.cuh>
#include <cub/block/block_load.cuh>
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/block/block_store.cuh>
#include <cub/warp/warp_reduce.cuh>
#include <cub/warp/warp_scan.cuh>

struct Larger {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// Inclusive, exclusive and running-maximum scans of 4 items per thread, and the total.
template <cub::BlockScanAlgorithm A, int THREADS>
__device__ void scan(const int* x, int* o) {
  using Scan = cub::BlockScan<int, THREADS, A>;
  __shared__ typename Scan::TempStorage storage;
  constexpr int n = THREADS * 4;
  int base = blockIdx.x * n + threadIdx.x * 4, total, v[4], r[4];
  for (int i = 0; i < 4; i++) v[i] = x[base + i];
  int* out = o + blockIdx.x * (3 * n + 1);
  Scan(storage).InclusiveSum(v, r, total);
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = r[i];
  __syncthreads();
  Scan(storage).ExclusiveSum(v, r);
  for (int i = 0; i < 4; i++) out[n + threadIdx.x * 4 + i] = r[i];
  __syncthreads();
  Scan(storage).InclusiveScan(v, r, Larger());
  for (int i = 0; i < 4; i++) out[2 * n + threadIdx.x * 4 + i] = r[i];
  if (threadIdx.x == 0) out[3 * n] = total;
}
extern "C" __global__ void scan_raking(const int* x, int* o) {
  scan<cub::BLOCK_SCAN_RAKING, 128>(x, o);
}
extern "C" __global__ void scan_memoize(const int* x, int* o) {
  scan<cub::BLOCK_SCAN_RAKING_MEMOIZE, 128>(x, o);
}
extern "C" __global__ void scan_warps(const int* x, int* o) {
  scan<cub::BLOCK_SCAN_WARP_SCANS, 128>(x, o);
}
extern "C" __global__ void scan_odd(const int* x, int* o) {
  scan<cub::BLOCK_SCAN_WARP_SCANS, 100>(x, o);
}

// Sum (of all, and of the first `valid`) and maximum.
template <cub::BlockReduceAlgorithm A, int THREADS>
__device__ void reduce(const double* x, int valid, double* o) {
  using Reduce = cub::BlockReduce<double, THREADS, A>;
  __shared__ typename Reduce::TempStorage storage;
  double v = x[blockIdx.x * THREADS + threadIdx.x];
  double sum = Reduce(storage).Sum(v);
  __syncthreads();
  double some = Reduce(storage).Sum(v, valid);
  __syncthreads();
  double most = Reduce(storage).Reduce(v, Larger());
  if (threadIdx.x == 0) {
    o[blockIdx.x * 3] = sum;
    o[blockIdx.x * 3 + 1] = some;
    o[blockIdx.x * 3 + 2] = most;
  }
}
extern "C" __global__ void reduce_raking(const double* x, int valid, double* o) {
  reduce<cub::BLOCK_REDUCE_RAKING, 128>(x, valid, o);
}
extern "C" __global__ void reduce_commutative(const double* x, int valid, double* o) {
  reduce<cub::BLOCK_REDUCE_RAKING_COMMUTATIVE_ONLY, 128>(x, valid, o);
}
extern "C" __global__ void reduce_warps(const double* x, int valid, double* o) {
  reduce<cub::BLOCK_REDUCE_WARP_REDUCTIONS, 128>(x, valid, o);
}
extern "C" __global__ void reduce_odd(const double* x, int valid, double* o) {
  reduce<cub::BLOCK_REDUCE_WARP_REDUCTIONS, 100>(x, valid, o);
}

// Keys of 64 bits or floats, descending, from blocked to striped; loads and stores through shared memory.
template <class Key>
__device__ void sort(const Key* x, Key* o, int n) {
  using Load = cub::BlockLoad<Key, 64, 7, cub::BLOCK_LOAD_WARP_TRANSPOSE>;
  using Sort = cub::BlockRadixSort<Key, 64, 7>;
  using Store = cub::BlockStore<Key, 64, 7, cub::BLOCK_STORE_TRANSPOSE>;
  __shared__ union {
    typename Load::TempStorage load;
    typename Sort::TempStorage sort;
    typename Store::TempStorage store;
  } storage;
  Key v[7];
  Load(storage.load).Load(x, v, n, Key(-1e30f));
  __syncthreads();
  Sort(storage.sort).SortDescending(v);
  __syncthreads();
  Store(storage.store).Store(o, v, n);
}
extern "C" __global__ void sort_float(const float* x, float* o, int n) {
  sort(x, o, n);
}
extern "C" __global__ void sort_long(const long long* x, long long* o, int n) {
  sort(x, o, n);
}

extern "C" __global__ void sort_bits(const unsigned* x, unsigned* o, int begin, int end) {
  using Sort = cub::BlockRadixSort<unsigned, 128, 2>;
  __shared__ typename Sort::TempStorage storage;
  unsigned v[2] = {x[threadIdx.x * 2], x[threadIdx.x * 2 + 1]};
  Sort(storage).SortBlockedToStriped(v, begin, end);
  o[threadIdx.x] = v[0];
  o[threadIdx.x + 128] = v[1];
}

// Per warp (of 32 and of 8 lanes): sums, head-segmented sums, scans.
template <int LANES>
__device__ void warp(const float* x, const int* heads, int valid, float* o) {
  using Reduce = cub::WarpReduce<float, LANES>;
  using Scan = cub::WarpScan<float, LANES>;
  __shared__ typename Reduce::TempStorage reduce[128 / LANES];
  __shared__ typename Scan::TempStorage scan[128 / LANES];
  int i = threadIdx.x, w = i / LANES;
  float v = x[i], before, total;
  float* out = o + i * 5;
  out[0] = Reduce(reduce[w]).Sum(v);
  __syncwarp();
  out[1] = Reduce(reduce[w]).Sum(v, valid);
  __syncwarp();
  out[2] = Reduce(reduce[w]).HeadSegmentedSum(v, heads[i]);
  __syncwarp();
  Scan(scan[w]).ExclusiveSum(v, before, total);
  out[3] = before;
  out[4] = total;
}
extern "C" __global__ void warp_32(const float* x, const int* heads, int valid, float* o) {
  warp<32>(x, heads, valid, o);
}
extern "C" __global__ void warp_8(const float* x, const int* heads, int valid, float* o) {
  warp<8>(x, heads, valid, o);
}

template <cub::BlockHistogramAlgorithm A>
__device__ void histogram(const unsigned char* x, int* o) {
  using Histogram = cub::BlockHistogram<unsigned char, 128, 4, 64, A>;
  __shared__ typename Histogram::TempStorage storage;
  __shared__ int bins[64];
  unsigned char v[4];
  for (int i = 0; i < 4; i++) v[i] = x[threadIdx.x * 4 + i];
  Histogram(storage).Histogram(v, bins);
  __syncthreads();
  if (threadIdx.x < 64) o[threadIdx.x] = bins[threadIdx.x];
}
extern "C" __global__ void histogram_sort(const unsigned char* x, int* o) {
  histogram<cub::BLOCK_HISTO_SORT>(x, o);
}
extern "C" __global__ void histogram_atomic(const unsigned char* x, int* o) {
  histogram<cub::BLOCK_HISTO_ATOMIC>(x, o);
}
