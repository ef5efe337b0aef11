// Kernels of test_ptxsim_launch.py.
#include <cassert>
#include <cstdio>

extern "C" __global__ void mixed(char a, double b, short c, float* o, long long d) {
  o[0] = a;
  o[1] = float(b);
  o[2] = c;
  o[3] = float(d);
}

// A list of tensors by value, as multi-tensor kernels take it: indexed by what a thread computes.
struct Tensors {
  const float* pointer[300];
  int length[300];
  float scale;
};

extern "C" __global__ void by_value(const __grid_constant__ Tensors t, float* o) {
  int k = blockIdx.x;
  for (int i = threadIdx.x; i < t.length[k]; i += blockDim.x) o[k * 8 + i] = t.pointer[k][i] * t.scale;
}

// The address is a parameter's or not: loads from generic addresses.
extern "C" __global__ void either(const __grid_constant__ Tensors t, const Tensors* other, float* o) {
  const Tensors* which = threadIdx.x & 1 ? other : &t;
  o[threadIdx.x] = which->pointer[threadIdx.x][0] * which->scale;
}

struct Large {
  int* out;
  int x[8188];  // 32760 bytes, of at most 32764
};
extern "C" __global__ void large(const __grid_constant__ Large a, int stride) {
  a.out[threadIdx.x] = a.x[threadIdx.x * stride];
}

extern "C" __global__ void checked(int* o, int limit) {
  assert(int(threadIdx.x) < limit && "an index in range");
  o[threadIdx.x] = 1;
}
extern "C" __global__ void traps(int* o) {
  if (threadIdx.x == 3) __trap();
}

__device__ __noinline__ int leave(int k) {
  if (k == 3) asm volatile("exit;");
  return k + 1;
}
extern "C" __global__ void exits(int* o) {
  o[threadIdx.x] = leave(threadIdx.x);
}

extern "C" __global__ void prints(int* o) {
  o[threadIdx.x] = 1;
  printf("thread %d\n", threadIdx.x);
}

extern "C" __global__ void sleeps(volatile int* flag) {
  if (threadIdx.x)
    *flag = 1;
  else
    while (!*flag) __nanosleep(100);
}
extern "C" __global__ void sleeps_for_ever(int* o) {
  for (;;) __nanosleep(100);
}
extern "C" __global__ void loops_for_ever(const int* x, int* o) {
  int i = threadIdx.x;
  while (x[i] == 0) i ^= 1;
  o[0] = i;
}

extern "C" __global__ void __launch_bounds__(64) at_most_64(int* o) {
  o[threadIdx.x] = 1;
}
extern "C" __global__ void takes_shared(int* o) {
  extern __shared__ int s[];
  s[threadIdx.x] = 1;
  o[threadIdx.x] = s[threadIdx.x];
}

// A noinline function with shared memory of its own.
__device__ __noinline__ int rotated(int x) {
  __shared__ int s[64];
  s[threadIdx.x] = x;
  __syncthreads();
  return s[(threadIdx.x + 1) % blockDim.x];
}
extern "C" __global__ void shares(int* o) {
  __shared__ int s[64];
  s[threadIdx.x] = rotated(threadIdx.x);
  __syncthreads();
  o[threadIdx.x] = s[(threadIdx.x + 1) % blockDim.x];
}

// Structs by value, into and out of functions; local arrays.
struct Row {
  float v[16];
  int n;
};
__device__ __noinline__ Row made(float x, int n) {
  Row r;
  for (int i = 0; i < 16; i++) r.v[i] = x * i;
  r.n = n;
  return r;
}
__device__ __noinline__ float summed(Row r, int k) {
  float sum = 0;
  for (int i = k; i < r.n; i++) sum += r.v[i * 7 & 15];
  return sum;
}
extern "C" __global__ void rows(float* o) {
  o[threadIdx.x] = summed(made(o[threadIdx.x], 16), threadIdx.x & 15);
}

__device__ int counter = 5, other = 7;
__device__ int* const pointers[] = {&other, &counter};
extern "C" __global__ void counts(int* o, int k) {
  atomicAdd(&counter, 1);
  *o = *pointers[k];
}
extern "C" __global__ void past_variable(int* o, int k) {
  *o = (&counter)[k];
}
