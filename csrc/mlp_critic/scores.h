// Row statistics of scores, and the gradient of the statistics with respect to a tile of scores.
#pragma once

#include "../common/simd.h"

namespace mk::mlp_critic {

namespace body {

template <class T>
MK_INLINE T log_sum_exp(int64_t n, const T* s, T low, T high) {
  T top = minus_infinity<T>();
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) top = s[j] > top ? s[j] : top;
  if (top == minus_infinity<T>()) {
    T total = T(0);  // there are no scores, or all are masked or NaN
    for (int64_t j = 0; j < n; ++j) total += s[j];
    return n == 0 || total == minus_infinity<T>() ? minus_infinity<T>() : total;
  }
  const T clipped_top = top < low ? low : top > high ? high : top;
  T sum = T(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const T bounded = s[j] < low ? low : s[j] > high ? high : s[j];
    // A masked score stays -inf.
    sum += fast_exp((s[j] == minus_infinity<T>() ? s[j] : bounded) - clipped_top);
  }
  return clipped_top + std::log(sum);
}

template <class T>
MK_INLINE T sum(int64_t n, const T* s) {
  T total = T(0);
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) total += s[j];
  return total;
}

// out = (add ? out : 0) + in
template <class T>
MK_INLINE void take_in(int64_t n, const T* in, bool add, T* out) {
  if (add) {
    for (int64_t j = 0; j < n; ++j) out[j] += in[j];
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = in[j];
  }
}

// Returns <a, b>, then multiplies b by `factor`.
template <class T>
MK_INLINE T dot_and_scale(int64_t n, const T* a, T factor, T* b) {
  T total = T(0);
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) {
    total += a[j] * b[j];
    b[j] *= factor;
  }
  return total;
}

template <class T>
MK_INLINE T softplus_sum(int64_t n, const T* s) {
  T total = T(0);
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) total += softplus(s[j]);
  return total;
}

// Adds a row of scores to the running log-sum-exps (top, total) of the columns. kWeighted: each score counts `weight`.
template <bool kWeighted, class T>
MK_INLINE void add_weighted(int64_t n, const T* s, const T* weight, T* top, T* total) {
  for (int64_t j = 0; j < n; ++j) {
    const T hi = s[j] > top[j] ? s[j] : top[j];
    const T ref = hi == minus_infinity<T>() ? T(0) : hi;
    const T added = fast_exp(s[j] - ref);
    total[j] = total[j] * fast_exp(top[j] - ref) + (kWeighted ? weight[j] * added : added);
    top[j] = hi;
  }
}
template <class T>
MK_INLINE void add_to_columns(int64_t n, const T* s, const T* weight, T* top, T* total) {
  weight ? add_weighted<true>(n, s, weight, top, total) : add_weighted<false>(n, s, weight, top, total);
}

// g += gr exp(s - lse) + gc_j exp(s - col_lse_j) + gs sigmoid(s); the columns' term is absent if its pointers are null.
template <class T>
MK_INLINE void add_gradient(int64_t n, const T* s, T gr, T lse, const T* gc, const T* col_lse, T gs, T* g) {
  if (gr != T(0))
    for (int64_t j = 0; j < n; ++j) g[j] += gr * fast_exp(s[j] - lse);
  if (gc)
    for (int64_t j = 0; j < n; ++j) g[j] += gc[j] * fast_exp(s[j] - col_lse[j]);
  if (gs != T(0))
    for (int64_t j = 0; j < n; ++j) g[j] += gs * sigmoid(s[j]);
}

}  // namespace body

#define MK_SCORE_FUNCTIONS(T)                                                                                         \
  [[maybe_unused]] MK_CLONES static T log_sum_exp(int64_t n, const T* s, T low, T high) {                             \
    return body::log_sum_exp(n, s, low, high);                                                                        \
  }                                                                                                                   \
  [[maybe_unused]] MK_CLONES static T sum(int64_t n, const T* s) { return body::sum(n, s); }                          \
  [[maybe_unused]] MK_CLONES static T softplus_sum(int64_t n, const T* s) { return body::softplus_sum(n, s); }        \
  [[maybe_unused]] MK_CLONES static void add_to_columns(int64_t n, const T* s, const T* weight, T* top, T* total) {   \
    body::add_to_columns(n, s, weight, top, total);                                                                   \
  }                                                                                                                   \
  [[maybe_unused]] MK_CLONES static void add_gradient(int64_t n, const T* s, T gr, T lse, const T* gc,                \
                                                      const T* col_lse, T gs, T* g) {                                 \
    body::add_gradient(n, s, gr, lse, gc, col_lse, gs, g);                                                            \
  }                                                                                                                   \
  [[maybe_unused]] MK_CLONES static void take_in(int64_t n, const T* in, bool add, T* out) {                          \
    body::take_in(n, in, add, out);                                                                                   \
  }                                                                                                                   \
  [[maybe_unused]] MK_CLONES static T dot_and_scale(int64_t n, const T* a, T factor, T* b) {                          \
    return body::dot_and_scale(n, a, factor, b);                                                                      \
  }                                                                                                                   \
  [[maybe_unused]] MK_CLONES static void softplus_all(int64_t n, const T* s, T* out) {                                \
    for (int64_t j = 0; j < n; ++j) out[j] = softplus(s[j]);                                                          \
  }                                                                                                                   \
  [[maybe_unused]] MK_CLONES static void times_sigmoid(int64_t n, const T* s, T* g) {                                 \
    for (int64_t j = 0; j < n; ++j) g[j] *= sigmoid(s[j]);                                                            \
  }
MK_SCORE_FUNCTIONS(float)
MK_SCORE_FUNCTIONS(double)
#undef MK_SCORE_FUNCTIONS

}  // namespace mk::mlp_critic
