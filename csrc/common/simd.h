// Elementwise primitives that compilers vectorise, built once per instruction set and picked at load time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(MK_CLONES)  // given by a test, which compiles for one instruction set
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define MK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MK_CLONES
#endif
#define MK_INLINE inline __attribute__((always_inline))

namespace mk {

constexpr int64_t kBlock = 64;  // columns of a tile: four AVX-512 registers of floats

// Splits x = n log 2 + r, |x| <= 88 and |r| <= log(2) / 2: returns 2^n and sets r.
MK_INLINE float power_of_two(float x, float& r) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// exp(x) for x <= 88 with an error below 2 ulp; exactly 0 below -87.3, so that a masked score of -inf adds nothing.
MK_INLINE float fast_exp(float x) {
  float r;
  const float power = power_of_two(x < -87.3f ? -87.3f : x, r);  // written so that NaN propagates
  float p = 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return x < -87.3f ? 0.0f : p * power;
}
MK_INLINE double fast_exp(double x) { return std::exp(x); }

// log(1 + t) for t in [0, 1]: 2 atanh(t / (2 + t)).
MK_INLINE float fast_log1p(float t) {
  const float z = t / (2.0f + t);
  const float q = z * z;
  float p = 1.0f / 15.0f;
  p = p * q + 1.0f / 13.0f;
  p = p * q + 1.0f / 11.0f;
  p = p * q + 1.0f / 9.0f;
  p = p * q + 1.0f / 7.0f;
  p = p * q + 1.0f / 5.0f;
  p = p * q + 1.0f / 3.0f;
  p = p * q + 1.0f;
  return 2.0f * z * p;
}
MK_INLINE double fast_log1p(double t) { return std::log1p(t); }

template <class T>
MK_INLINE T softplus(T s) {
  const T magnitude = s < T(0) ? -s : s;
  return (s > T(0) ? s : T(0)) + fast_log1p(fast_exp(-magnitude));
}

template <class T>
MK_INLINE T sigmoid(T s) {
  const T e = fast_exp(s < T(0) ? s : -s);
  return (s < T(0) ? e : T(1)) / (T(1) + e);
}

// erf(x) with an error below 2e-7 (Abramowitz and Stegun 7.1.26), given e = exp(-x^2).
MK_INLINE float fast_erf(float x, float e) {
  const float t = 1.0f / (1.0f + 0.3275911f * (x < 0.0f ? -x : x));
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float y = 1.0f - p * t * e;
  return x < 0.0f ? -y : y;
}
MK_INLINE double fast_erf(double x, double) { return std::erf(x); }

// x rounded to bf16 (to nearest, ties to even), as bits in the upper half of the word; NaN stays NaN.
MK_INLINE uint32_t bf16_high(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return x == x ? (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u : 0x7fc00000u;
}
MK_INLINE uint16_t bf16_bits(float x) { return static_cast<uint16_t>(bf16_high(x) >> 16); }
// Two values as a VNNI pair of bf16, the first in the lower half.
MK_INLINE uint32_t bf16_pair(float first, float second) { return (bf16_high(first) >> 16) | bf16_high(second); }

[[maybe_unused]] MK_CLONES static void to_bf16(int64_t n, const float* in, uint16_t* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = bf16_bits(in[j]);
}

template <class T>
constexpr T minus_infinity() {
  return -std::numeric_limits<T>::infinity();
}

}  // namespace mk
