// Kernels of test_cuda.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

extern "C" __global__ void cub_sort(const unsigned* in, unsigned* out, const int* vin, int* vout) {
  using Sort = cub::BlockRadixSort<unsigned, 128, 8, int>;
  __shared__ typename Sort::TempStorage storage;
  unsigned keys[8];
  int values[8];
  int base = blockIdx.x * 1024 + threadIdx.x * 8;
  for (int i = 0; i < 8; i++) {
    keys[i] = in[base + i];
    values[i] = vin[base + i];
  }
  Sort(storage).Sort(keys, values);
  for (int i = 0; i < 8; i++) {
    out[base + i] = keys[i];
    vout[base + i] = values[i];
  }
}

extern "C" __global__ void cub_scan(const int* in, int* out, float* sums) {
  using Scan = cub::BlockScan<int, 256>;
  using Reduce = cub::BlockReduce<float, 256>;
  __shared__ typename Scan::TempStorage scan;
  __shared__ typename Reduce::TempStorage reduce;
  int i = blockIdx.x * 256 + threadIdx.x, x = in[i];
  Scan(scan).ExclusiveSum(x, x);
  out[i] = x;
  float total = Reduce(reduce).Sum(float(in[i]));
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

extern "C" __global__ void half_math(const __half2* a, const __half2* b, __half2* o, const __nv_bfloat162* c,
                                     __nv_bfloat162* p, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  o[i] = __hfma2(a[i], b[i], __hadd2(a[i], b[i]));
  p[i] = __hmul2(c[i], c[i]);
}

extern "C" __global__ void atomics(const unsigned* x, int n, float* f, unsigned* u, unsigned long long* w, __half2* h,
                                   __nv_bfloat162* b, int* m) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    atomicAdd(f, 0.5f);
    atomicAdd(u + x[i] % 16, 1u);
    atomicAdd(w, (unsigned long long)x[i]);
    if (i < 64) atomicAdd(h, __floats2half2_rn(1.f, 2.f));
    if (i < 64) atomicAdd(b, __floats2bfloat162_rn(1.f, 2.f));
    atomicMax(m, int(x[i] >> 1));
    atomicMin(m + 1, int(x[i] >> 1));
    unsigned old = u[16], seen;
    do {
      seen = old;
      old = atomicCAS(u + 16, seen, seen + 3);
    } while (old != seen);
    atomicInc(u + 17, 9);
  }
}

extern "C" __global__ void warp_ops(const int* in, int* out) {
  int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x & 31, v = in[i], sum = v;
  for (int d = 1; d < 32; d <<= 1) {
    int t = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += t;
  }
  int* o = out + i * 8;
  o[0] = sum;
  o[1] = __shfl_xor_sync(~0u, v, 5);
  o[2] = __shfl_sync(~0u, v, 3, 16);
  o[3] = int(__ballot_sync(~0u, v & 1));
  o[4] = int(__match_any_sync(~0u, v % 5));
  o[5] = __any_sync(~0u, v > 90) + 2 * __all_sync(~0u, v >= 0);
  if (v & 1) {
    o[6] = int(__reduce_add_sync(__activemask() | unsigned(o[3]), unsigned(v)));
  } else {
    o[6] = int(__reduce_max_sync(~unsigned(o[3]), unsigned(v)));
  }
  o[7] = __syncthreads_count(v > 50);
}

extern "C" __global__ void copy4(const float4* a, float4* o, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    float4 v = a[i];
    o[i] = make_float4(v.w, v.z * 2.f, v.y + 1.f, v.x - v.w);
  }
}

extern "C" __global__ void saxpy(const float* x, float* y, float a, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) y[i] += a * x[i];
}

struct Pair {
  int scale;
  double shift;
};

template <class T>
__global__ void templated(T* x, Pair p, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = T(x[i] * p.scale + p.shift);
}
template __global__ void templated<float>(float*, Pair, int);

// The last block to finish adds up the partial sums of all.
extern "C" __global__ void last_block(const float* x, float* partial, unsigned* count, float* out) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = x[blockIdx.x];
    __threadfence();
    last = atomicAdd(count, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    __threadfence();
    float sum = 0;
    for (int i = 0; i < gridDim.x; i++) sum += partial[i];
    *out = sum;
  }
}

extern "C" __global__ void libm(const float* x, float* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  o[i * 4] = sinf(x[i] * 1e5f);
  o[i * 4 + 1] = powf(fabsf(x[i]), 1.7f);
  o[i * 4 + 2] = erff(x[i]);
  o[i * 4 + 3] = expf(x[i]) + log1pf(fabsf(x[i]));
}

__device__ int table[4] = {10, 20, 30, 40};
__constant__ float weights[2] = {1.5f, -2.f};

__device__ __noinline__ int pick(int k, int x) {
  switch (k % 5) {
    case 0:
      return x * 3;
    case 1:
      return x ^ 0x55;
    case 2:
      return table[x & 3];
    case 3:
      return ~x;
    default:
      return x / 7;
  }
}

extern "C" __global__ void calls(const int* x, float* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x, local[8];
  if (i >= n) return;
  for (int j = 0; j < 8; j++) local[j] = x[i] + j;
  o[i] = float(pick(i, local[x[i] & 7])) * weights[i & 1];
}

extern "C" __global__ void through_table(const float* const* table, float* o) {
  o[threadIdx.x] = table[blockIdx.x][threadIdx.x];
}

extern "C" __global__ void take_turns(int* o, volatile int* turn) {
  while (*turn != threadIdx.x) {
  }
  *o = *o * 3 + int(threadIdx.x);
  __threadfence();
  *turn = int(threadIdx.x) + 1;
}
