// C[m, n] (+)= A[m, k] B[k, n] on tiles that stay in cache: oneDNN's brgemm where torch provides it, else plain loops.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <cstdlib>
#include <cstring>

#include "simd.h"

namespace mk {

// Two rows of W columns of C are kept in registers.
namespace body {
template <int64_t W, class T>
MK_INLINE void plain_block(int64_t m, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const T* a, const T* b,
                           T* c) {
  for (int64_t i = 0; i < m; i += 2) {
    const int64_t second = i + 1 < m ? 1 : 0;  // an odd last row is computed twice
    const T *a0 = a + i * lda, *a1 = a0 + second * lda;
    T *c0 = c + i * ldc, *c1 = c0 + second * ldc;
    T s0[W], s1[W];
    for (int64_t j = 0; j < W; ++j) s0[j] = add ? c0[j] : T(0);
    for (int64_t j = 0; j < W; ++j) s1[j] = add ? c1[j] : T(0);
    for (int64_t p = 0; p < k; ++p) {
      const T x0 = a0[p], x1 = a1[p];
      for (int64_t j = 0; j < W; ++j) {
        s0[j] += x0 * b[p * ldb + j];
        s1[j] += x1 * b[p * ldb + j];
      }
    }
    for (int64_t j = 0; j < W; ++j) c0[j] = s0[j];
    for (int64_t j = 0; j < W; ++j) c1[j] = s1[j];
  }
}
template <class T>
MK_INLINE void plain(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const T* a,
                     const T* b, T* c) {
  int64_t j = 0;
  for (; j + kBlock <= n; j += kBlock) plain_block<kBlock>(m, k, lda, ldb, ldc, add, a, b + j, c + j);
  for (; j < n; j += 16) plain_block<16>(m, k, lda, ldb, ldc, add, a, b + j, c + j);
}
}  // namespace body

#define MK_PLAIN_GEMM(T)                                                                                            \
  MK_CLONES static inline void plain_gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, \
                                          bool add, const T* a, const T* b, T* c) {                                \
    body::plain(m, n, k, lda, ldb, ldc, add, a, b, c);                                                              \
  }
MK_PLAIN_GEMM(float)
MK_PLAIN_GEMM(double)
#undef MK_PLAIN_GEMM

// MI_KERNELS_PLAIN_GEMM=1 forces the plain loops, which are otherwise used on CPUs without oneDNN's kernels.
inline bool plain_gemm_wanted() {
  static const bool wanted = [] {
    const char* const value = std::getenv("MI_KERNELS_PLAIN_GEMM");
    return value && *value && std::strcmp(value, "0") != 0;
  }();
  return wanted;
}

#ifdef CPUBLAS_BRGEMM_F32F32F32
inline bool has_brgemm_fp32() {
  static const bool supported = [] {
    if (plain_gemm_wanted()) return false;
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
#else
inline bool has_brgemm_fp32() { return false; }
#endif

#ifdef CPUBLAS_BRGEMM_BF16BF16F32
// 16-bit tiles are faster only if the CPU multiplies bf16 natively, which torch's pack test detects.
inline bool has_brgemm_bf16() {
  static const bool supported = [] {
#if defined(__x86_64__) && defined(__GNUC__)
    if (plain_gemm_wanted() || !__builtin_cpu_supports("avx512bf16")) return false;
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

// C[m, n] (+)= A[m, k] B[k, n]; n is a multiple of 16. lda, ldb and ldc are the row strides.
inline void gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const double* a,
                 const double* b, double* c) {
  plain_gemm(m, n, k, lda, ldb, ldc, add, a, b, c);
}

inline void gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a,
                 const float* b, float* c) {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  if (has_brgemm_fp32()) {
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
    return;
  }
#endif
  plain_gemm(m, n, k, lda, ldb, ldc, add, a, b, c);
}

// The same with bf16 operands and B in VNNI order: rows 2p and 2p+1 interleaved, [k / 2][ldb][2]; k is even.
inline void gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                 const c10::BFloat16* a, const c10::BFloat16* b, float* c) {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, true);
#endif
}

// The same for contiguous tiles B and C of kBlock columns.
template <class E, class T>
inline void gemm(int64_t m, int64_t k, int64_t lda, bool add, const E* a, const E* b, T* c) {
  gemm(m, kBlock, k, lda, kBlock, kBlock, add, a, b, c);
}

inline void release_gemm([[maybe_unused]] bool low_precision) {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  if (has_brgemm_fp32()) at::native::cpublas::brgemm_release(low_precision);
#endif
}

}  // namespace mk
