// Activations of the MLP critic and their derivatives at the pre-activation z. NaN propagates.
#pragma once

#include "../common/simd.h"
#include "schema.h"

namespace mk::mlp_critic {

enum class Act : int64_t { kRelu, kLeakyRelu, kTanh, kSigmoid, kElu, kGelu, kSilu };  // in the order of kActivations

template <class T>
MK_INLINE T capped_exp(T x) {
  return fast_exp(x > T(80) ? T(80) : x);
}

template <Act A, class T>
MK_INLINE T activate(T z) {
  if constexpr (A == Act::kRelu) return z < T(0) ? T(0) : z;
  if constexpr (A == Act::kLeakyRelu) return z < T(0) ? z * T(0.01) : z;
  if constexpr (A == Act::kTanh) return T(1) - T(2) / (capped_exp(z + z) + T(1));
  if constexpr (A == Act::kSigmoid) return sigmoid(z);
  if constexpr (A == Act::kElu) return z > T(0) ? z : capped_exp(z) - T(1);
  if constexpr (A == Act::kGelu) {
    const T x = z * T(0.70710678118654752);
    return T(0.5) * z * (T(1) + fast_erf(x, fast_exp(-x * x)));
  }
  if constexpr (A == Act::kSilu) return z * sigmoid(z);
}

template <Act A, class T>
MK_INLINE T slope(T z) {
  if constexpr (A == Act::kRelu) return z <= T(0) ? T(0) : T(1);
  if constexpr (A == Act::kLeakyRelu) return z <= T(0) ? T(0.01) : T(1);
  if constexpr (A == Act::kTanh) {
    const T h = activate<A>(z);
    return T(1) - h * h;
  }
  if constexpr (A == Act::kSigmoid) {
    const T h = sigmoid(z);
    return h * (T(1) - h);
  }
  if constexpr (A == Act::kElu) return z > T(0) ? T(1) : capped_exp(z);
  if constexpr (A == Act::kGelu) {
    const T x = z * T(0.70710678118654752);
    const T e = fast_exp(-x * x);
    return T(0.5) * (T(1) + fast_erf(x, e)) + z * e * T(0.39894228040143268);
  }
  if constexpr (A == Act::kSilu) {
    const T h = sigmoid(z);
    return h * (T(1) + z * (T(1) - h));
  }
}

}  // namespace mk::mlp_critic
