// The threshold of sparsemax without sorting, for one vector of rows at a time (rows along the lanes).
//
// With z = s - max s, tau solves f(tau) = sum_j max(z_j - tau, 0) - 1 = 0. f is convex, piecewise linear and
// decreasing, so Newton's steps tau <- (sum_{z > tau} z - 1) / #{z > tau} from tau = -1 increase to the root and reach
// it exactly after finitely many steps, in practice three to six (Michelot 1986 takes the same steps). Only keys with
// z > -1 in some row can be in a support, so these candidates are gathered first.
#pragma once

#include <cmath>

#include "vec.h"

namespace mk::cross_attention {
inline namespace MK_ISA {
namespace body {

template <class T>
struct Threshold {
  Vec<T> top, tau;  // p_j = max(s_j - top - tau, 0)
  Vec<T> size;      // number of keys in the support
  int64_t candidates;
};

// Thresholds for the scores [n][stride] of one vector of rows. A score of -inf marks a masked key; NaN or +inf makes
// tau NaN. `z` [n][lanes] receives the candidates' z and `index` their keys.
template <class T>
MK_INLINE Threshold<T> threshold(int64_t n, const T* s, int64_t stride, T* z, int32_t* index) {
  const Vec<T> zero = fill(T(0)), low = fill(minus_infinity<T>());
  Vec<T> top0 = low, top1 = low;
  IntVec<T> lost = low != low;  // rows with a NaN or +inf
  int64_t j = 0;
  for (; j + 2 <= n; j += 2) {
    const Vec<T> a = load(s + j * stride), b = load(s + (j + 1) * stride);
    top0 = larger<T>(top0, a);
    top1 = larger<T>(top1, b);
    lost |= (a != a) | (b != b);
  }
  if (j < n) {
    const Vec<T> a = load(s + j * stride);
    top0 = larger<T>(top0, a);
    lost |= a != a;
  }
  Threshold<T> found;
  found.top = larger<T>(top0, top1);
  lost |= found.top == -low;
  found.top = found.top == low ? zero : found.top;
  int64_t m = 0;
  Vec<T> sum = zero, size = zero;
  for (j = 0; j < n; ++j) {
    const Vec<T> d = load(s + j * stride) - found.top;
    const IntVec<T> counts = d > T(-1);
    store(z + m * kLanes<T>, d);
    index[m] = static_cast<int32_t>(j);
    m += any<T>(counts);
    sum += counts ? d : zero;
    size += counts ? zero + T(1) : zero;
  }
  if (m == 0 && any<T>(lost)) m = 1;  // one candidate is needed to propagate the NaN
  found.candidates = m;
  for (;;) {
    found.tau = (sum - T(1)) / larger<T>(size, zero + T(1));
    Vec<T> next_sum = zero, next_size = zero;
    for (j = 0; j < m; ++j) {
      const Vec<T> d = load(z + j * kLanes<T>);
      const IntVec<T> counts = d > found.tau;
      next_sum += counts ? d : zero;
      next_size += counts ? zero + T(1) : zero;
    }
    const bool changed = any<T>(next_size < size);
    // Rounding may raise tau past the last key of the support, or let a removed key in again. Neither is a Newton step.
    const IntVec<T> step = (next_size < size) & (next_size > zero);
    if (!changed || !any<T>(step)) break;
    sum = step ? next_sum : sum;
    size = step ? next_size : size;
  }
  found.size = size;
  found.tau = lost ? fill(std::numeric_limits<T>::quiet_NaN()) : found.tau;
  return found;
}

// The statistic that is saved for the backward, top + tau. If scores are so large that it would be rounded up to top,
// it is the next number below top, so that the support does not become empty.
template <class T>
MK_INLINE Vec<T> statistic(const Threshold<T>& found) {
  Vec<T> stat = found.top + found.tau;
  if (!any<T>(stat >= found.top)) return stat;
  for (int64_t l = 0; l < kLanes<T>; ++l)
    if (stat[l] >= found.top[l]) stat[l] = std::nextafter(found.top[l], -std::numeric_limits<T>::infinity());
  return stat;
}

// A weight from the score's excess over the statistic, clamped to [0, 1]: only a rounded statistic leads beyond 1.
template <class T>
MK_INLINE Vec<T> sparse_weight(const Vec<T>& over) {
  const Vec<T> p = larger<T>(over, fill(T(0)));
  return p > T(1) ? fill(T(1)) : p;
}

}  // namespace body
}  // namespace MK_ISA
}  // namespace mk::cross_attention
