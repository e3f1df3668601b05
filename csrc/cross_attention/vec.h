// Vectors of one register, with attention's operations on them: exp2, sums over lanes, the dropout hash.
//
// One source per instruction set includes this header, with the set's name in MK_ISA and the size of its registers in
// MK_VECTOR_BYTES. Vectors must not be wider: GCC splits them before it inlines, which makes slow code.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "item.h"

namespace mk::cross_attention {
inline namespace MK_ISA {

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int64_t n = MK_VECTOR_BYTES / 4;
  typedef float V __attribute__((vector_size(MK_VECTOR_BYTES), may_alias, aligned(4)));
  typedef int32_t I __attribute__((vector_size(MK_VECTOR_BYTES), may_alias, aligned(4)));
  typedef uint32_t U __attribute__((vector_size(MK_VECTOR_BYTES), may_alias, aligned(4)));
  using Int = int32_t;
  using Word = uint32_t;
};
template <>
struct Lanes<double> {
  static constexpr int64_t n = MK_VECTOR_BYTES / 8;
  typedef double V __attribute__((vector_size(MK_VECTOR_BYTES), may_alias, aligned(8)));
  typedef int64_t I __attribute__((vector_size(MK_VECTOR_BYTES), may_alias, aligned(8)));
  typedef uint64_t U __attribute__((vector_size(MK_VECTOR_BYTES), may_alias, aligned(8)));
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
// The larger of a and b; a NaN in a propagates.
template <class T>
MK_INLINE Vec<T> larger(const Vec<T>& a, const Vec<T>& b) {
  return a < b ? b : a;
}

// Sums over lanes add the two halves of a vector, repeatedly.
#define MK_FOLD(T, bytes)                                            \
  typedef T T##bytes __attribute__((vector_size(bytes), may_alias)); \
  struct T##bytes##Halves {                                          \
    T##bytes low, high;                                              \
  };
using word = int64_t;
MK_FOLD(float, 16)
MK_FOLD(double, 16)
MK_FOLD(word, 16)
MK_INLINE float fold_sum(const float16& v) { return (v[0] + v[2]) + (v[1] + v[3]); }
MK_INLINE double fold_sum(const double16& v) { return v[0] + v[1]; }
MK_INLINE word fold_or(const word16& v) { return v[0] | v[1]; }
#if MK_VECTOR_BYTES >= 32
MK_FOLD(float, 32)
MK_FOLD(double, 32)
MK_FOLD(word, 32)
#define MK_HALVE(name, T, op, bytes, half)                         \
  MK_INLINE T name(const T##bytes& v) {                            \
    const auto h = __builtin_bit_cast(T##half##Halves, v);         \
    return name(h.low op h.high);                                  \
  }
MK_HALVE(fold_sum, float, +, 32, 16)
MK_HALVE(fold_sum, double, +, 32, 16)
MK_HALVE(fold_or, word, |, 32, 16)
#endif
#if MK_VECTOR_BYTES >= 64
MK_FOLD(float, 64)
MK_FOLD(double, 64)
MK_FOLD(word, 64)
MK_HALVE(fold_sum, float, +, 64, 32)
MK_HALVE(fold_sum, double, +, 64, 32)
MK_HALVE(fold_or, word, |, 64, 32)
#endif
#define MK_JOIN2(a, b) a##b
#define MK_JOIN(a, b) MK_JOIN2(a, b)
template <class T>
MK_INLINE bool any(const IntVec<T>& mask) {
  return fold_or(__builtin_bit_cast(MK_JOIN(word, MK_VECTOR_BYTES), mask)) != 0;
}
MK_INLINE float sum_lanes(const Vec<float>& v) { return fold_sum(__builtin_bit_cast(MK_JOIN(float, MK_VECTOR_BYTES), v)); }
MK_INLINE double sum_lanes(const Vec<double>& v) { return fold_sum(__builtin_bit_cast(MK_JOIN(double, MK_VECTOR_BYTES), v)); }

template <class T>
MK_INLINE void set(T* p, int64_t n, T x) {
  for (int64_t i = 0; i < n; ++i) p[i] = x;
}

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// 2^x for x <= 127 with an error of 2 ulp; x below -125 gives 2^-125. The coefficients are a minimax fit of 2^r on
// [-1/2, 1/2].
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
  for (int64_t l = 0; l < kLanes<double>; ++l) out[l] = std::exp2(x[l]);
  return out;
}

// The dropout hash of schema.py.
struct RowKey {
  uint32_t r1, r2;
};
MK_INLINE RowKey row_key(uint32_t head_key, int64_t i) {
  const uint32_t r1 = mix(head_key + static_cast<uint32_t>(i));
  return {r1, mix(head_key ^ r1)};
}
// A mask of the weights that dropout keeps. `r1` and `r2` are the rows' hash keys, `golden` is 0x9e3779b9 j.
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

}  // namespace MK_ISA
}  // namespace mk::cross_attention
