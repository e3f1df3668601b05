// Finds pairs of rows whose distance is lost in the rounding of inner products, and computes it from differences.
//
// |a|^2 + |b|^2 - 2 a.b has an error of a few eps (|a|^2 + |b|^2). With samples in units of the smallest bandwidth,
// this matters only for a pair whose norms are large (the samples spread over many bandwidths) and whose distance is
// small compared with them. The kernel values of all other pairs are correct to about 1e-6 in fp32. A tile that
// contains such a pair is computed from differences of the rows as they were given, before centring rounds them.
#pragma once

#include <algorithm>

#include "../common/simd.h"

namespace mk::rbf {

constexpr float kSafeNorms = 32.0f;      // in squared bandwidths; below it, every distance is accurate enough
constexpr float kNear = 1.0f / 64.0f;    // as a fraction of the norms; above it, a squared distance is accurate
constexpr float kLargestNorms = 1e30f;   // above it, or with a NaN, products may overflow
constexpr float kFarthest = 1e36f;       // largest squared distance; finite, so that 0 (the kernel value) times it is 0

namespace body {

template <class T>
MK_INLINE void about(int64_t n, const T* in, const T* centre, T scale, T* out) {
  for (int64_t d = 0; d < n; ++d) out[d] = (in[d] - centre[d]) * scale;
}

// Whether any pair of a tile is near, from inner products s [rows][kBlock].
template <class T>
MK_INLINE bool any_near(int64_t rows, const T* row_norm, const T* col_norm, const T* s) {
  T norm[kBlock];
  int32_t found[kBlock] = {};
  for (int64_t j = 0; j < kBlock; ++j) norm[j] = col_norm[j];
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < kBlock; ++j) {
      const T norms = row_norm[i] + norm[j], distance = norms - T(2) * s[i * kBlock + j];
      found[j] |= static_cast<int32_t>(norms > T(kSafeNorms)) & static_cast<int32_t>(distance < T(kNear) * norms);
    }
  int32_t any = 0;
  for (int64_t j = 0; j < kBlock; ++j) any |= found[j];
  return any != 0;
}

// s [rows][kBlock] = -|scale (x_i - y_j)|^2 / 2. As inner products, together with norms of 0, they give
// squared_distances() the right distances.
template <class T>
MK_INLINE void from_differences(int64_t rows, int64_t depth, T scale, const T* x, const T* yt, T* s) {
  for (int64_t i = 0; i < rows; ++i) {
    T r[kBlock] = {};
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t j = 0; j < kBlock; ++j) {
        const T difference = (x[i * depth + d] - yt[d * kBlock + j]) * scale;
        r[j] += difference * difference;
      }
    for (int64_t j = 0; j < kBlock; ++j) s[i * kBlock + j] = T(-0.5) * (r[j] > T(kFarthest) ? T(kFarthest) : r[j]);
  }
}

// Given gradients w [rows][kBlock]: subtracts sum_j w_ij scale (x_i - y_j) from `own` [depth / kBlock][kBlock][kBlock],
// and adds the sum over i to `other` [depth][kBlock]; either may be null. A gradient of 0 adds 0 even if the distance
// is infinite.
template <class T>
MK_INLINE void along_differences(int64_t rows, int64_t depth, T scale, const T* x, const T* yt, const T* w, T* own,
                                 T* other) {
  for (int64_t d = 0; d < depth; ++d) {
    T column[kBlock], total[kBlock] = {};
    for (int64_t j = 0; j < kBlock; ++j) column[j] = yt[d * kBlock + j];
    for (int64_t i = 0; i < rows; ++i) {
      const T at = x[i * depth + d];
      T sum = T(0);
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < kBlock; ++j) {
        const T slope = w[i * kBlock + j], v = slope == T(0) ? T(0) : slope * ((at - column[j]) * scale);
        total[j] += v;
        sum += v;
      }
      if (own) own[(d / kBlock * kBlock + i) * kBlock + d % kBlock] -= sum;
    }
    for (int64_t j = 0; other && j < kBlock; ++j) other[d * kBlock + j] += total[j];
  }
}

}  // namespace body

#define MK_NEAR_FUNCTIONS(T)                                                                                         \
  [[maybe_unused]] MK_CLONES static void about(int64_t n, const T* in, const T* centre, T scale, T* out) {          \
    body::about(n, in, centre, scale, out);                                                                          \
  }                                                                                                                  \
  [[maybe_unused]] MK_CLONES static bool any_near(int64_t rows, const T* row_norm, const T* col_norm, const T* s) { \
    return body::any_near(rows, row_norm, col_norm, s);                                                              \
  }                                                                                                                  \
  [[maybe_unused]] MK_CLONES static void from_differences(int64_t rows, int64_t depth, T scale, const T* x,         \
                                                          const T* yt, T* s) {                                      \
    body::from_differences(rows, depth, scale, x, yt, s);                                                            \
  }                                                                                                                  \
  [[maybe_unused]] MK_CLONES static void along_differences(int64_t rows, int64_t depth, T scale, const T* x,        \
                                                           const T* yt, const T* w, T* own, T* other) {             \
    body::along_differences(rows, depth, scale, x, yt, w, own, other);                                               \
  }
MK_NEAR_FUNCTIONS(float)
MK_NEAR_FUNCTIONS(double)
#undef MK_NEAR_FUNCTIONS

}  // namespace mk::rbf
