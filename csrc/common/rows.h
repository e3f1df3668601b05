// Loops over rows [rows][depth] before and after the tiles: normalisation and its gradient, changes of layout.
#pragma once

#include <algorithm>
#include <utility>

#include "simd.h"

namespace mk::rows {

namespace body {

// out = in / max(|in|, 1e-12), inverse = 1 / max(|in|, 1e-12), as in torch.nn.functional.normalize.
template <class T>
MK_INLINE void normalize(int64_t n, int64_t depth, const T* in, T* out, T* inverse) {
  for (int64_t i = 0; i < n; ++i, in += depth, out += depth) {
    T total = T(0), top = T(0);
#pragma omp simd reduction(max : top)
    for (int64_t d = 0; d < depth; ++d) {
      const T a = in[d] < T(0) ? -in[d] : in[d];
      top = a > top ? a : top;
    }
    const T shrink = top > T(1e12) ? T(1) / top : T(1);  // keeps the squares from overflowing
#pragma omp simd reduction(+ : total)
    for (int64_t d = 0; d < depth; ++d) total += (in[d] * shrink) * (in[d] * shrink);
    const T norm = std::sqrt(total) / shrink;
    const T inv = T(1) / (norm < T(1e-12) ? T(1e-12) : norm);  // written so that NaN propagates
    for (int64_t d = 0; d < depth; ++d) out[d] = in[d] * inv;
    inverse[i] = inv;
  }
}

// Turns the gradient g of the normalised rows u into that of the original rows, in place: (g - u <u, g>) / norm.
template <class T>
MK_INLINE void through_normalization(int64_t n, int64_t depth, const T* u, const T* inverse, T* g) {
  for (int64_t i = 0; i < n; ++i, u += depth, g += depth) {
    T dot = T(0);
#pragma omp simd reduction(+ : dot)
    for (int64_t d = 0; d < depth; ++d) dot += u[d] * g[d];
    if (inverse[i] >= T(1e12)) dot = T(0);  // below the clamp the norm is constant
    const T inv = inverse[i];
    for (int64_t d = 0; d < depth; ++d) g[d] = (g[d] - dot * u[d]) * inv;
  }
}

template <class T>
MK_INLINE void scaled_copy(int64_t n, const T* in, T factor, T* out) {
  for (int64_t d = 0; d < n; ++d) out[d] = in[d] * factor;
}

template <class T>
MK_INLINE double dot(int64_t n, const T* a, const T* b) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t d = 0; d < n; ++d) total += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  return total;
}

// One butterfly step of a transpose: swaps between two rows the lanes whose index has the bit kStep.
template <class V, int kStep, size_t... L>
MK_INLINE void exchange(V& a, V& b, std::index_sequence<L...>) {
  constexpr int kLanes = sizeof...(L);
  const V low = __builtin_shufflevector(a, b, ((L & kStep) ? static_cast<int>(kLanes + L - kStep) : static_cast<int>(L))...);
  b = __builtin_shufflevector(a, b, ((L & kStep) ? static_cast<int>(kLanes + L) : static_cast<int>(L + kStep))...);
  a = low;
}

template <class V, int kLanes, int kStep>
MK_INLINE void butterflies(V* r) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kStep)) exchange<V, kStep>(r[i], r[i + kStep], std::make_index_sequence<kLanes>());
  if constexpr (kStep > 1) butterflies<V, kLanes, kStep / 2>(r);
}

// out[c][r] = in[r][c] * weight[r] for a square whose rows are 64 bytes long, in registers.
template <class T>
MK_INLINE void transpose_square(const T* in, int64_t in_stride, const T* weight, T* out, int64_t out_stride) {
  constexpr int kLanes = 64 / sizeof(T);
  typedef T V __attribute__((vector_size(64), aligned(alignof(T)), may_alias));
  V r[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    r[i] = *reinterpret_cast<const V*>(in + i * in_stride);
    if (weight) r[i] *= weight[i];
  }
  butterflies<V, kLanes, kLanes / 2>(r);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) *reinterpret_cast<V*>(out + i * out_stride) = r[i];
}

// out[c][r] = in[r][c] * weight[r] for r < rows, c < columns.
template <class T>
MK_INLINE void transpose(int64_t rows, int64_t columns, const T* in, int64_t in_stride, const T* weight, T* out,
                         int64_t out_stride) {
  constexpr int64_t kSide = 64 / sizeof(T);
  for (int64_t r0 = 0; r0 < rows; r0 += kSide)
    for (int64_t c0 = 0; c0 < columns; c0 += kSide) {
      if (r0 + kSide <= rows && c0 + kSide <= columns) {
        transpose_square(in + r0 * in_stride + c0, in_stride, weight ? weight + r0 : nullptr, out + c0 * out_stride + r0,
                         out_stride);
        continue;
      }
      for (int64_t r = r0; r < std::min(r0 + kSide, rows); ++r)
        for (int64_t c = c0; c < std::min(c0 + kSide, columns); ++c)
          out[c * out_stride + r] = in[r * in_stride + c] * (weight ? weight[r] : T(1));
    }
}

template <class T>
MK_INLINE void add(int64_t n, const T* other, T* sum) {
  for (int64_t e = 0; e < n; ++e) sum[e] += other[e];
}

template <class T>
MK_INLINE void squared_norms(int64_t n, int64_t depth, const T* in, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    T total = T(0);
#pragma omp simd reduction(+ : total)
    for (int64_t d = 0; d < depth; ++d) total += in[i * depth + d] * in[i * depth + d];
    out[i] = total;
  }
}

// out += along * direction - back
template <class T>
MK_INLINE void step_along(int64_t n, T along, const T* direction, const T* back, T* out) {
  for (int64_t d = 0; d < n; ++d) out[d] += along * direction[d] - back[d];
}

}  // namespace body

#define MK_ROW_FUNCTIONS(T)                                                                                          \
  [[maybe_unused]] MK_CLONES static void normalize(int64_t n, int64_t depth, const T* in, T* out, T* inverse) {     \
    body::normalize(n, depth, in, out, inverse);                                                                     \
  }                                                                                                                  \
  [[maybe_unused]] MK_CLONES static void through_normalization(int64_t n, int64_t depth, const T* u, const T* inv,  \
                                                               T* g) {                                              \
    body::through_normalization(n, depth, u, inv, g);                                                                \
  }                                                                                                                  \
  [[maybe_unused]] MK_CLONES static void scaled_copy(int64_t n, const T* in, T factor, T* out) {                    \
    body::scaled_copy(n, in, factor, out);                                                                           \
  }                                                                                                                  \
  [[maybe_unused]] MK_CLONES static double dot(int64_t n, const T* a, const T* b) { return body::dot(n, a, b); }    \
  [[maybe_unused]] MK_CLONES static void transpose(int64_t rows, int64_t columns, const T* in, int64_t in_stride,   \
                                                   const T* weight, T* out, int64_t out_stride) {                    \
    body::transpose(rows, columns, in, in_stride, weight, out, out_stride);                                          \
  }                                                                                                                  \
  [[maybe_unused]] MK_CLONES static void add(int64_t n, const T* other, T* sum) { body::add(n, other, sum); }       \
  [[maybe_unused]] MK_CLONES static void squared_norms(int64_t n, int64_t depth, const T* in, T* out) {             \
    body::squared_norms(n, depth, in, out);                                                                          \
  }                                                                                                                  \
  [[maybe_unused]] MK_CLONES static void step_along(int64_t n, T along, const T* direction, const T* back, T* out) { \
    body::step_along(n, along, direction, back, out);                                                                \
  }
MK_ROW_FUNCTIONS(float)
MK_ROW_FUNCTIONS(double)
#undef MK_ROW_FUNCTIONS

}  // namespace mk::rows
