// The numbers that kernels read and write, and the places of entries in dense tensors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../ops/jobs.h"

namespace saft::cuda {

using BFloat16 = __nv_bfloat16;
using Half = __half;

__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(BFloat16 x) {
  return __bfloat162float(x);
}
__device__ inline float to_float(Half x) {
  return __half2float(x);
}
__device__ inline double to_float(double x) {
  return x;
}

// Round to nearest, ties to even.
template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline BFloat16 from_float<BFloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline Half from_float<Half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline double from_float<double>(float x) {
  return x;
}

// The memory offset, in elements, of a flat index in logical row-major order.
__device__ inline int64_t place_of(const Strided& layout, int64_t index) {
  if (layout.dims == 0) return index;
  int64_t place = 0;
#pragma unroll 1  // divisions of 64 bits are long, and strided tensors rare
  for (int d = layout.dims - 1; d >= 0; --d) {
    place += index % layout.sizes[d] * layout.strides[d];
    index /= layout.sizes[d];
  }
  return place;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace saft::cuda
