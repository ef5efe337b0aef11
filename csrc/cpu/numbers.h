// Conversions between fp32 and the 16-bit floating types, as branch-free integer code: the compiler
// vectorises it for every instruction set, and the bits are the same on all of them.
//
// Everything is in an unnamed namespace on purpose: see isa.h on linkage.
#pragma once

#include <cstdint>

namespace saft::cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  return __builtin_bit_cast(uint32_t, x);
}
inline float from_bits(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}

inline double to_float(double x) {
  return x;
}
inline float to_float(float x) {
  return x;
}
inline float to_float(BFloat16 x) {
  return from_bits(uint32_t{x.bits} << 16);
}

inline float to_float(Half x) {
  const uint32_t sign = (uint32_t{x.bits} & 0x8000u) << 16;
  const uint32_t magnitude = (uint32_t{x.bits} & 0x7fffu) << 13;
  // Reading the shifted bits as fp32 leaves the value 2^-112 too small; the product is exact, also for
  // denormals. Infinity and NaN need the exponent field filled instead.
  const uint32_t finite = bits_of(from_bits(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  return from_bits(sign | (magnitude >= 0x0f800000u ? special : finite));
}

template <typename T>
T from_float(float x);

template <>
inline double from_float<double>(float x) {
  return x;
}

template <>
inline float from_float<float>(float x) {
  return x;
}

// Round to nearest, ties to even; NaN stays NaN.
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

template <>
inline Half from_float<Half>(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: rebias the exponent, round the 13 dropped bits to nearest even.
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Denormal results: adding 0.5 aligns the mantissa, and the fp32 addition itself rounds to nearest even.
  const uint32_t denormal = bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace
}  // namespace saft::cpu
