// Scalar semantics: conversions, rounding, integer and bit operations.
#pragma once
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace ptx {

// ---------------------------------------------------------------- raw bits <-> values
template <class T>
inline auto bits(T v) {
  if constexpr (sizeof(T) == 8) {
    return std::bit_cast<uint64_t>(v);
  } else if constexpr (sizeof(T) == 4) {
    return std::bit_cast<uint32_t>(v);
  } else {
    return std::make_unsigned_t<T>(v);
  }
}

template <class T, class U>
inline T as(U raw) {
  if constexpr (sizeof(T) == 8) {
    return std::bit_cast<T>(uint64_t(raw));
  } else {
    return std::bit_cast<T>(uint32_t(raw));
  }
}

// ---------------------------------------------------------------- half, bfloat16, tf32
inline float f16_to_f32(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exp = h >> 10 & 31, man = h & 1023;
  if (exp == 31) return std::bit_cast<float>(sign | 0x7f800000u | man << 13);
  if (exp) return std::bit_cast<float>(sign | (exp + 112) << 23 | man << 13);
  float f = float(man) * 0x1p-24f;
  return sign ? -f : f;
}

inline float bf16_to_f32(uint16_t b) {
  return std::bit_cast<float>(uint32_t(b) << 16);
}

inline uint16_t f32_to_f16(float f) {
  uint32_t u = std::bit_cast<uint32_t>(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return 0x7fff;
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds to >= 65520
  if (a < 0x38800000u) {                                 // subnormal half
    float t = std::bit_cast<float>(a) + 0.5f;
    return uint16_t(sign | (std::bit_cast<uint32_t>(t) - 0x3f000000u));
  }
  a += 0xfffu + (a >> 13 & 1);
  return uint16_t(sign | (a - 0x38000000u) >> 13);
}

inline uint16_t f32_to_bf16(float f) {
  uint32_t u = std::bit_cast<uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

// Truncating variants (cvt.rz).
inline uint16_t f32_to_bf16_rz(float f) {
  uint32_t u = std::bit_cast<uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t(u >> 16);
}

inline uint16_t f32_to_f16_rz(float f) {
  uint16_t h = f32_to_f16(f);
  if (std::isnan(f) || std::isinf(f)) return h;
  return std::fabs(f16_to_f32(h)) > std::fabs(f) ? uint16_t(h - 1) : h;
}

// Rounds a double to float "to odd", so that a second rounding to a narrower type is exact.
inline float to_f32_odd(double d) {
  float f = float(d);
  if (std::isnan(f) || double(f) == d) return f;
  uint32_t u = std::bit_cast<uint32_t>(f);
  if (u & 1) return f;
  bool up = std::fabs(double(f)) > std::fabs(d);
  return std::bit_cast<float>(up ? u - 1 : u + 1);
}

// The same for an integer and double.
template <class T>
inline double to_f64_odd(T v) {
  double d = double(v);
  auto back = static_cast<__int128>(d);
  uint64_t u = std::bit_cast<uint64_t>(d);
  if (back == v || (u & 1)) return d;
  return std::bit_cast<double>((back > v) == (v > 0) ? u - 1 : u + 1);
}

inline uint16_t to_f16(float f) {
  return f32_to_f16(f);
}
inline uint16_t to_f16(double d) {
  return f32_to_f16(to_f32_odd(d));
}
inline uint16_t to_bf16(float f) {
  return f32_to_bf16(f);
}
inline uint16_t to_bf16(double d) {
  return f32_to_bf16(to_f32_odd(d));
}

// a * b + c in double, rounded to odd; a * b must be exact.
inline double fma_odd(double a, double b, double c) {
  double p = a * b, s = p + c, t = s - p, err = (p - (s - t)) + (c - t);
  if (!std::isfinite(s) || err == 0) return s;
  uint64_t u = std::bit_cast<uint64_t>(s);
  if (u & 1) return s;
  return std::bit_cast<double>((err > 0) == (s > 0) ? u + 1 : u - 1);
}

inline uint32_t to_tf32_rna(float f) {
  uint32_t u = std::bit_cast<uint32_t>(f);
  if ((u & 0x7f800000u) == 0x7f800000u) return u;
  return (u + 0x1000u) & 0xffffe000u;
}

inline uint32_t to_tf32_rn(float f) {
  uint32_t u = std::bit_cast<uint32_t>(f);
  if ((u & 0x7f800000u) == 0x7f800000u) return u;
  return (u + 0xfffu + (u >> 13 & 1)) & 0xffffe000u;
}

// ---------------------------------------------------------------- floating point
inline float ftz(float f) {
  return std::fabs(f) < 0x1p-126f ? std::copysign(0.f, f) : f;
}

template <class T>
inline T saturate(T x) {
  if (!(x > 0)) return T(0);
  return x > 1 ? T(1) : x;
}

template <class T>
inline T fmin_num(T a, T b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}

template <class T>
inline T fmax_num(T a, T b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}

template <class T>
inline T fmin_nan(T a, T b) {
  return std::isnan(a) || std::isnan(b) ? T(NAN) : fmin_num(a, b);
}

template <class T>
inline T fmax_nan(T a, T b) {
  return std::isnan(a) || std::isnan(b) ? T(NAN) : fmax_num(a, b);
}

template <class T>
inline bool ordered_ne(T a, T b) {
  return a < b || a > b;
}

// Evaluates f() in another rounding mode.
template <class F>
[[gnu::noinline]] auto with_rounding(int mode, F f) {
  int saved = fegetround();
  fesetround(mode);
  volatile auto r = f();
  fesetround(saved);
  return decltype(f())(r);
}

template <class T, class F>
inline T float_to_int(F f) {
  if (std::isnan(f)) return sizeof(T) == 8 ? T(1ull << 63) : T(0);
  constexpr T lo = std::numeric_limits<T>::min(), hi = std::numeric_limits<T>::max();
  if (double(f) <= double(lo)) return lo;
  if (double(f) >= double(hi)) return hi;
  return T(f);
}

template <class D, class S>
inline D clamp_int(S v) {
  constexpr __int128 lo = std::numeric_limits<D>::min(), hi = std::numeric_limits<D>::max();
  __int128 x = v;
  return x < lo ? D(lo) : x > hi ? D(hi) : D(v);
}

// ---------------------------------------------------------------- integers and bits
inline int32_t sat_s32(int64_t x) {
  return clamp_int<int32_t>(x);
}

template <class T>
inline T mul_hi(T a, T b) {
  using W = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return T((W(a) * W(b)) >> (8 * sizeof(T)));
}

template <class T>
inline T int_div(T a, T b) {
  if (b == 0) return T(~T(0));
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return T(0 - std::make_unsigned_t<T>(a));
  return a / b;
}

template <class T>
inline T int_rem(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return a % b;
}

template <class T>
inline T shift_left(T a, uint32_t n) {
  return n >= 8 * sizeof(T) ? T(0) : T(a << n);
}

template <class T>
inline T shift_right(T a, uint32_t n) {
  if (n >= 8 * sizeof(T)) return a < 0 ? T(-1) : T(0);
  return T(a >> n);
}

inline uint32_t funnel_left(uint32_t lo, uint32_t hi, uint32_t n) {
  return uint32_t(((uint64_t(hi) << 32 | lo) << n) >> 32);
}

inline uint32_t funnel_right(uint32_t lo, uint32_t hi, uint32_t n) {
  return uint32_t((uint64_t(hi) << 32 | lo) >> n);
}

inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t lut) {
  uint32_t r = 0;
  for (int i = 0; i < 8; i++)
    if (lut >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t sel) {
  uint64_t v = uint64_t(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t k = sel >> (4 * i) & 15, byte = v >> (8 * (k & 7)) & 255;
    if (k & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << (8 * i);
  }
  return r;
}

template <class T>
inline T bfe(T a, uint32_t pos, uint32_t len) {
  using U = std::make_unsigned_t<T>;
  constexpr uint32_t N = 8 * sizeof(T);
  pos &= 255;
  len &= 255;
  bool sign = false;
  if (std::is_signed_v<T> && len) sign = U(a) >> std::min(pos + len - 1, N - 1) & 1;
  U r = 0;
  for (uint32_t i = 0; i < N; i++) {
    bool b = i < len && pos + i < N ? (U(a) >> (pos + i) & 1) : sign;
    r |= U(b) << i;
  }
  return T(r);
}

template <class T>
inline T bfi(T a, T b, uint32_t pos, uint32_t len) {
  constexpr uint32_t N = 8 * sizeof(T);
  pos &= 255;
  len &= 255;
  T r = b;
  for (uint32_t i = 0; i < len && pos + i < N; i++) r = (r & ~(T(1) << (pos + i))) | ((a >> i & T(1)) << (pos + i));
  return r;
}

template <class T>
inline uint32_t bfind(T a, bool shift_amount) {
  using U = std::make_unsigned_t<T>;
  constexpr int N = 8 * sizeof(T);
  U u = a;
  if (std::is_signed_v<T> && a < 0) u = ~u;
  int zeros = std::countl_zero(u);
  if (zeros == N) return ~0u;
  return shift_amount ? zeros : N - 1 - zeros;
}

inline uint32_t bmsk(uint32_t a, uint32_t b, bool clamp) {
  if (!clamp) {
    a &= 31;
    b &= 31;
  }
  if (a >= 32) return 0;
  return uint32_t((b >= 32 ? ~0ull : (1ull << b) - 1) << a);
}

template <class T>
inline T bit_reverse(T x) {
  constexpr unsigned N = 8 * sizeof(T);
  T r = 0;
  for (unsigned i = 0; i < N; i++) r |= (x >> i & 1) << (N - 1 - i);
  return r;
}

// Four-byte dot products (dp4a) of signed or unsigned bytes.
template <class A, class B>
inline uint32_t dp4a(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 4; i++) c += uint32_t(int32_t(A(a >> 8 * i)) * int32_t(B(b >> 8 * i)));
  return c;
}

}  // namespace ptx
