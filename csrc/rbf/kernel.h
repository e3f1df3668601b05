// The Gaussian kernel of squared distances, elementwise.
#pragma once

#include "../common/simd.h"

namespace mk::rbf {

// k = exp(t) and e = k - 1 for t <= 0, both with a small relative error (k = e + 1 would lose the digits of a small k):
// with t = n log 2 + r, k = 2^n expm1(r) + 2^n and e = 2^n expm1(r) + (2^n - 1).
MK_INLINE void exponentials(float t, float& k, float& e) {
  float r;
  float power = power_of_two(t < -87.0f ? -87.0f : t, r);  // written so that NaN propagates
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r;
  power = t < -87.0f ? 0.0f : power;  // k is then 0: exp(-87) times a large r^2 would not be
  k = power * p + power;
  e = power * p + (power - 1.0f);
}
MK_INLINE void exponentials(double t, double& k, double& e) {
  if (t < -1.0) {
    k = std::exp(t), e = k - 1.0;
  } else {
    e = std::expm1(t), k = e + 1.0;
  }
}

// Squared distances r of one row to 64 columns from their inner products; exactly 0 if within rounding error of 0.
template <class T>
MK_INLINE void squared_distances(T own, const T* norm, const T* s, T* r) {
  const T tolerance = T(4) * std::numeric_limits<T>::epsilon();
  for (int64_t j = 0; j < kBlock; ++j) {
    const T norms = own + norm[j], d = norms - T(2) * s[j];
    r[j] = d <= tolerance * norms ? T(0) : d;  // NaN propagates
  }
}

}  // namespace mk::rbf
