// Explicit vectors of one cache line, and what attention does with them: exp2, lane sums, the dropout hash.
//
// Everything is inlined into functions that are built per instruction set (MK_CLONES): the compiler splits a vector where
// its registers are narrower.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../common/simd.h"

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a call that is not inlined
#endif

namespace mk::attention {

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int64_t n = 16;
  typedef float V __attribute__((vector_size(64), may_alias, aligned(4)));
  typedef int32_t I __attribute__((vector_size(64), may_alias, aligned(4)));
  typedef uint32_t U __attribute__((vector_size(64), may_alias, aligned(4)));
  using Int = int32_t;
  using Word = uint32_t;
};
template <>
struct Lanes<double> {
  static constexpr int64_t n = 8;
  typedef double V __attribute__((vector_size(64), may_alias, aligned(8)));
  typedef int64_t I __attribute__((vector_size(64), may_alias, aligned(8)));
  typedef uint64_t U __attribute__((vector_size(64), may_alias, aligned(8)));
  using Int = int64_t;
  using Word = uint64_t;
};
template <class T>
using Vec = typename Lanes<T>::V;
template <class T>
using IntVec = typename Lanes<T>::I;
template <class T>
using WordVec = typename Lanes<T>::U;
template <class T>
constexpr int64_t kLanes = Lanes<T>::n;

template <class T>
MK_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
MK_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}
template <class T>
MK_INLINE Vec<T> fill(T x) {
  return x - Vec<T>{};
}
template <class T>
MK_INLINE IntVec<T> iota(int64_t first) {
  IntVec<T> v;
  for (int64_t l = 0; l < kLanes<T>; ++l) v[l] = static_cast<typename Lanes<T>::Int>(first + l);
  return v;
}
// b where b is larger: a NaN in a stays.
template <class T>
MK_INLINE Vec<T> larger(const Vec<T>& a, const Vec<T>& b) {
  return a < b ? b : a;
}
template <class T>
MK_INLINE bool any(IntVec<T> mask) {
  typedef int64_t Quad __attribute__((vector_size(32)));
  typedef int64_t Pair __attribute__((vector_size(16)));
  union {
    IntVec<T> all;
    Quad quads[2];
  } u = {mask};
  union {
    Quad quad;
    Pair pairs[2];
  } w = {u.quads[0] | u.quads[1]};
  const Pair p = w.pairs[0] | w.pairs[1];
  return (p[0] | p[1]) != 0;
}

MK_INLINE float sum_lanes(Vec<float> v) {
  typedef float V8 __attribute__((vector_size(32)));
  typedef float V4 __attribute__((vector_size(16)));
  union {
    Vec<float> all;
    V8 halves[2];
  } a = {v};
  union {
    V8 all;
    V4 halves[2];
  } b = {a.halves[0] + a.halves[1]};
  const V4 c = b.halves[0] + b.halves[1];
  return (c[0] + c[2]) + (c[1] + c[3]);
}
MK_INLINE double sum_lanes(Vec<double> v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// 2^x for x <= 127, error 2 ulp; 2^-125 for anything below. The coefficients are a minimax fit of 2^r on [-1/2, 1/2].
MK_INLINE Vec<float> exp2_lanes(Vec<float> x) {
  const Vec<float> magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  x = larger<float>(x, fill(-125.0f));
  const Vec<float> shifted = x + magic;
  const Vec<float> r = x - (shifted - magic);
  Vec<float> p = fill(1.327647129e-03f);
  p = p * r + 9.675540961e-03f;
  p = p * r + 5.550713092e-02f;
  p = p * r + 2.402212024e-01f;
  p = p * r + 6.931469440e-01f;
  p = p * r + 1.0f;
  const IntVec<float> power = reinterpret_cast<IntVec<float>>(shifted) << 23;
  return reinterpret_cast<Vec<float>>(reinterpret_cast<IntVec<float>>(p) + power);
}
MK_INLINE Vec<double> exp2_lanes(Vec<double> x) {
  Vec<double> out;
  for (int64_t l = 0; l < 8; ++l) out[l] = std::exp2(x[l]);
  return out;
}

// The dropout hash of schema.py.
MK_INLINE uint32_t mix(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du;
  x ^= x >> 15, x *= 0x846ca68bu;
  return x ^ (x >> 16);
}
struct RowKey {
  uint32_t r1, r2;
};
MK_INLINE RowKey row_key(uint32_t head_key, int64_t i) {
  const uint32_t r1 = mix(head_key + static_cast<uint32_t>(i));
  return {r1, mix(head_key ^ r1)};
}
// All bits set where the weight is kept. `r1` and `r2` belong to the rows, `golden` is 0x9e3779b9 j.
template <class T>
MK_INLINE IntVec<T> kept(WordVec<T> r1, WordVec<T> r2, WordVec<T> golden, uint32_t threshold) {
  using Word = typename Lanes<T>::Word;
  constexpr Word kMask = 0xffffffffu;
  WordVec<T> x = (r1 + golden) & kMask;
  x ^= x >> 16;
  x = ((x * Word(0x7feb352du)) & kMask) ^ r2;
  x ^= x >> 15;
  x = (x * Word(0x846ca68bu)) & kMask;
  x ^= x >> 16;
  return reinterpret_cast<IntVec<T>>(x >= Word(threshold));
}
template <class T>
MK_INLINE WordVec<T> fill_word(uint32_t x) {
  return WordVec<T>{} + static_cast<typename Lanes<T>::Word>(x);
}
// 0x9e3779b9 j for the lanes j, j + 1, ...
template <class T>
MK_INLINE WordVec<T> golden_lanes(int64_t j) {
  constexpr typename Lanes<T>::Word kGolden = 0x9e3779b9u, kMask = 0xffffffffu;
  return (kGolden * (reinterpret_cast<WordVec<T>>(iota<T>(0)) + static_cast<uint32_t>(j))) & kMask;
}

}  // namespace mk::attention
