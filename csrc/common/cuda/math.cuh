// Scalar functions that kernels share: exponentials, softplus and its derivative, log-sum-exps as (maximum, sum).
#pragma once

#include "primitives.cuh"

namespace mk {

constexpr float kLog2e = 1.4426950408889634f;
#define MK_INFINITY __uint_as_float(0x7f800000u)

__device__ __forceinline__ float fast_exp(float x) { return fast_exp2(x * kLog2e); }

// A running log-sum-exp: the sum of exponentials is sum * exp(top). Without elements it is (-inf, 0).
struct LogSum {
  float top, sum;
};

__device__ __forceinline__ float finite_reference(float top) { return top == -MK_INFINITY ? 0.0f : top; }

__device__ __forceinline__ LogSum merge(LogSum a, LogSum b) {
  const float top = fmaxf(a.top, b.top), reference = finite_reference(top);
  return {top, a.sum * fast_exp(a.top - reference) + b.sum * fast_exp(b.top - reference)};
}

__device__ __forceinline__ float log_of(LogSum v) { return v.sum == 0.0f ? -MK_INFINITY : v.top + logf(v.sum); }

// log(1 + t) for t in [0, 1], as 2 artanh(t / (2 + t)): accurate even where 1 + t rounds to 1.
__device__ __forceinline__ float log1p_unit(float t) {
  const float r = t / (2.0f + t), z = r * r;
  float poly = 1.0f / 15;
#pragma unroll
  for (int k = 6; k >= 0; --k) poly = poly * z + 1.0f / (2 * k + 1);
  return 2.0f * r * poly;
}

__device__ __forceinline__ float softplus(float s) { return fmaxf(s, 0.0f) + log1p_unit(fast_exp(-fabsf(s))); }

__device__ __forceinline__ float sigmoid(float s) {
  const float t = fast_exp(-fabsf(s));
  return (s >= 0.0f ? 1.0f : t) / (1.0f + t);
}

}  // namespace mk
