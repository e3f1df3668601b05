// C[m, n] (+)= A[m, k] B[k, n] on tiles that stay in cache: oneDNN's brgemm where torch has it, a plain loop elsewhere.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include "simd.h"

namespace mk {

constexpr int64_t kBlock = 64;  // columns of a tile: four AVX-512 registers of floats

// B and C hold rows of kBlock elements. Four rows of C are kept in registers.
#define MK_PLAIN_GEMM(T)                                                                                     \
  MK_CLONES inline void plain_gemm(int64_t m, int64_t k, int64_t lda, bool add, const T* a, const T* b, T* c) { \
    int64_t i = 0;                                                                                           \
    for (; i + 2 <= m; i += 2) {                                                                             \
      T s0[kBlock], s1[kBlock];                                                                              \
      for (int64_t j = 0; j < kBlock; ++j) s0[j] = add ? c[i * kBlock + j] : T(0);                           \
      for (int64_t j = 0; j < kBlock; ++j) s1[j] = add ? c[(i + 1) * kBlock + j] : T(0);                     \
      for (int64_t p = 0; p < k; ++p) {                                                                      \
        const T a0 = a[i * lda + p], a1 = a[(i + 1) * lda + p];                                              \
        for (int64_t j = 0; j < kBlock; ++j) {                                                               \
          s0[j] += a0 * b[p * kBlock + j];                                                                   \
          s1[j] += a1 * b[p * kBlock + j];                                                                   \
        }                                                                                                    \
      }                                                                                                      \
      for (int64_t j = 0; j < kBlock; ++j) c[i * kBlock + j] = s0[j];                                        \
      for (int64_t j = 0; j < kBlock; ++j) c[(i + 1) * kBlock + j] = s1[j];                                  \
    }                                                                                                        \
    for (; i < m; ++i) {                                                                                     \
      T s0[kBlock];                                                                                          \
      for (int64_t j = 0; j < kBlock; ++j) s0[j] = add ? c[i * kBlock + j] : T(0);                           \
      for (int64_t p = 0; p < k; ++p)                                                                        \
        for (int64_t j = 0; j < kBlock; ++j) s0[j] += a[i * lda + p] * b[p * kBlock + j];                    \
      for (int64_t j = 0; j < kBlock; ++j) c[i * kBlock + j] = s0[j];                                        \
    }                                                                                                        \
  }
static MK_PLAIN_GEMM(float)
static MK_PLAIN_GEMM(double)
#undef MK_PLAIN_GEMM

#ifdef CPUBLAS_BRGEMM_F32F32F32
inline bool has_brgemm_fp32() {
  static const bool supported = [] {
    try {
      float a[4] = {1, 1, 1, 1}, b[4 * kBlock] = {}, c[kBlock];
      at::native::cpublas::brgemm(1, kBlock, 4, 4, kBlock, kBlock, false, a, b, c, false);
      return true;
    } catch (const c10::Error&) {
      return false;
    }
  }();
  return supported;
}
#endif

#ifdef CPUBLAS_BRGEMM_BF16BF16F32
// 16-bit tiles pay only where the CPU multiplies bf16 natively; torch's own pack test tells.
inline bool has_brgemm_bf16() {
  static const bool supported = [] {
#if defined(__x86_64__) && defined(__GNUC__)
    if (!__builtin_cpu_supports("avx512bf16")) return false;
    try {
      c10::BFloat16 a[2] = {}, b[2 * kBlock] = {};
      float c[kBlock];
      at::native::cpublas::brgemm(1, kBlock, 2, 2, kBlock, kBlock, false, a, b, c, true);
      return true;
    } catch (const c10::Error&) {
      return false;
    }
#else
    return false;
#endif
  }();
  return supported;
}
#else
inline bool has_brgemm_bf16() { return false; }
#endif

inline void gemm(int64_t m, int64_t k, int64_t lda, bool add, const double* a, const double* b, double* c) {
  plain_gemm(m, k, lda, add, a, b, c);
}

inline void gemm(int64_t m, int64_t k, int64_t lda, bool add, const float* a, const float* b, float* c) {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  if (has_brgemm_fp32()) {
    at::native::cpublas::brgemm(m, kBlock, k, lda, kBlock, kBlock, add, a, b, c, false);
    return;
  }
#endif
  plain_gemm(m, k, lda, add, a, b, c);
}

// B in VNNI order: rows 2p and 2p+1 interleaved, [k / 2][kBlock][2]; k is even.
inline void gemm(int64_t m, int64_t k, int64_t lda, bool add, const c10::BFloat16* a, const c10::BFloat16* b,
                 float* c) {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  at::native::cpublas::brgemm(m, kBlock, k, lda, kBlock, kBlock, add, a, b, c, true);
#endif
}

inline void release_gemm(bool low_precision) {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  at::native::cpublas::brgemm_release(low_precision);
#endif
}

}  // namespace mk
