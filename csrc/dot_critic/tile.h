// Elementwise operations and reductions on a tile of scores S[m][kBlock] while it is in cache, for float and double.
#pragma once

#include <algorithm>

#include "../common/simd.h"

namespace mk::tile {

template <class T>
struct DScore {  // weights of the terms of one tile's gradient; a null pointer means that a term is absent
  const T* row_lse;
  const T* g_row;
  const T* col_lse;
  const T* g_col;
  const T* g_soft;
  T* softplus_sum;  // optional: accumulates sum_j softplus(S_ij)
  bool factored;    // compute exp(S - col_lse) from exp(S - row_lse); see Problem::gradient
  const T* row_factor;
  const T* col_factor;
};

namespace body {

template <class T>
MK_INLINE void affine(int64_t m, T* s, T scale, const T* row_bias, const T* col_bias) {
  for (int64_t i = 0; i < m; ++i) {
    const T a = row_bias ? row_bias[i] : T(0);
    T* r = s + i * kBlock;
    if (col_bias) {
      for (int64_t j = 0; j < kBlock; ++j) r[j] = r[j] * scale + a + col_bias[j];
    } else {
      for (int64_t j = 0; j < kBlock; ++j) r[j] = r[j] * scale + a;
    }
  }
}

// Clamps scores to [-clip, clip]. -inf, which marks an excluded pair, and NaN are unchanged.
template <class T>
MK_INLINE void clip_scores(int64_t m, T* s, T clip) {
  for (int64_t k = 0; k < m * kBlock; ++k) {
    const T v = s[k] > clip ? clip : s[k];
    s[k] = (v < -clip) & (v > minus_infinity<T>()) ? -clip : v;
  }
}

template <class T>
MK_INLINE void row_max(int64_t m, const T* s, T* top) {
  for (int64_t i = 0; i < m; ++i) {
    T v = top[i];
    const T* r = s + i * kBlock;
#pragma omp simd reduction(max : v)
    for (int64_t j = 0; j < kBlock; ++j) v = r[j] > v ? r[j] : v;
    top[i] = v;
  }
}

// e = exp(s - top), sum += row sums; e may be s.
template <class T>
MK_INLINE void exp_rows(int64_t m, const T* s, T* e, const T* top, T* sum) {
  for (int64_t i = 0; i < m; ++i) {
    const T t = top[i];
    T total = T(0);
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < kBlock; ++j) {
      const T v = fast_exp(s[i * kBlock + j] - t);
      e[i * kBlock + j] = v;
      total += v;
    }
    sum[i] += total;
  }
}

// part[j] = sum_i factor[i] e[i][j]
template <class T>
MK_INLINE void weighted_columns(int64_t m, const T* e, const T* factor, T* part) {
  T acc[kBlock];
  for (int64_t j = 0; j < kBlock; ++j) acc[j] = T(0);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < kBlock; ++j) acc[j] += factor[i] * e[i * kBlock + j];
  for (int64_t j = 0; j < kBlock; ++j) part[j] = acc[j];
}

template <class T>
MK_INLINE void exact_columns(int64_t m, const T* s, T* top, T* part) {
  for (int64_t j = 0; j < kBlock; ++j) top[j] = minus_infinity<T>();
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < kBlock; ++j) top[j] = s[i * kBlock + j] > top[j] ? s[i * kBlock + j] : top[j];
  for (int64_t j = 0; j < kBlock; ++j) part[j] = T(0);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < kBlock; ++j) {
      const T t = top[j] == minus_infinity<T>() ? T(0) : top[j];
      part[j] += fast_exp(s[i * kBlock + j] - t);
    }
}

// Merges a second (top, sum) of a log-sum-exp into the first.
template <class T>
MK_INLINE void merge(int64_t n, T* top, T* sum, const T* other_top, const T* other_sum) {
  for (int64_t j = 0; j < n; ++j) {
    const T hi = top[j] > other_top[j] ? top[j] : other_top[j];
    const T ref = hi == minus_infinity<T>() ? T(0) : hi;
    sum[j] = sum[j] * fast_exp(top[j] - ref) + other_sum[j] * fast_exp(other_top[j] - ref);
    top[j] = hi;
  }
}

// r = soft sigmoid(r) + gr exp(r - lse) + g_col exp(r - col_lse), with the terms that are asked for. A condition inside
// the loop would keep it from being vectorised.
template <bool kRow, bool kCol, class T>
MK_INLINE void mixed_row(T* r, T soft, T gr, T lse, const T* g_col, const T* col_lse) {
  for (int64_t j = 0; j < kBlock; ++j) {
    const T v = r[j];
    T d = soft * sigmoid(v);
    if constexpr (kRow) d += gr * fast_exp(v - lse);
    if constexpr (kCol) d += g_col[j] * fast_exp(v - col_lse[j]);
    r[j] = d;
  }
}

template <class T>
MK_INLINE void dscore(int64_t m, T* s, const DScore<T>& w) {
  for (int64_t i = 0; i < m; ++i) {
    T* r = s + i * kBlock;
    const T soft = w.g_soft ? w.g_soft[i] : T(0);
    if (w.g_soft) {
      if (w.softplus_sum) {
        T total = T(0);
#pragma omp simd reduction(+ : total)
        for (int64_t j = 0; j < kBlock; ++j) total += softplus(r[j]);
        w.softplus_sum[i] += total;
      }
      if (!w.g_row && !w.g_col) {
        for (int64_t j = 0; j < kBlock; ++j) r[j] = soft * sigmoid(r[j]);
        continue;
      }
    }
    const T lse = w.g_row ? w.row_lse[i] : T(0);
    const T gr = w.g_row ? w.g_row[i] : T(0);
    if (w.g_row && w.g_col && !w.g_soft && w.factored) {
      const T u = w.row_factor[i];
      for (int64_t j = 0; j < kBlock; ++j) r[j] = fast_exp(r[j] - lse) * (gr + u * (w.g_col[j] * w.col_factor[j]));
    } else if (w.g_row && !w.g_col && !w.g_soft) {
      for (int64_t j = 0; j < kBlock; ++j) r[j] = gr * fast_exp(r[j] - lse);
    } else if (w.g_row && w.g_col && !w.g_soft) {
      for (int64_t j = 0; j < kBlock; ++j)
        r[j] = gr * fast_exp(r[j] - lse) + w.g_col[j] * fast_exp(r[j] - w.col_lse[j]);
    } else if (w.g_row && w.g_col) {
      mixed_row<true, true>(r, soft, gr, lse, w.g_col, w.col_lse);
    } else if (w.g_row) {
      mixed_row<true, false>(r, soft, gr, lse, w.g_col, w.col_lse);
    } else if (w.g_col) {
      mixed_row<false, true>(r, soft, gr, lse, w.g_col, w.col_lse);
    } else {
      mixed_row<false, false>(r, soft, gr, lse, w.g_col, w.col_lse);
    }
  }
}

template <class T>
MK_INLINE void row_sums(int64_t m, const T* s, T* sum) {
  for (int64_t i = 0; i < m; ++i) {
    T total = T(0);
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < kBlock; ++j) total += s[i * kBlock + j];
    sum[i] += total;
  }
}

template <class T>
MK_INLINE void col_sums(int64_t m, const T* s, T* sum) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < kBlock; ++j) sum[j] += s[i * kBlock + j];
}

template <class T>
MK_INLINE void softplus_rows(int64_t m, const T* s, T* sum) {
  for (int64_t i = 0; i < m; ++i) {
    T total = T(0);
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < kBlock; ++j) total += softplus(s[i * kBlock + j]);
    sum[i] += total;
  }
}

}  // namespace body

#define MK_TILE_FUNCTIONS(T)                                                                                        \
  [[maybe_unused]] MK_CLONES static void affine(int64_t m, T* s, T scale, const T* a, const T* b) {                \
    body::affine(m, s, scale, a, b);                                                                                \
  }                                                                                                                 \
  [[maybe_unused]] MK_CLONES static void clip_scores(int64_t m, T* s, T clip) { body::clip_scores(m, s, clip); }    \
  [[maybe_unused]] MK_CLONES static void row_max(int64_t m, const T* s, T* top) { body::row_max(m, s, top); }      \
  [[maybe_unused]] MK_CLONES static void exp_rows(int64_t m, const T* s, T* e, const T* top, T* sum) {             \
    body::exp_rows(m, s, e, top, sum);                                                                              \
  }                                                                                                                 \
  [[maybe_unused]] MK_CLONES static void weighted_columns(int64_t m, const T* e, const T* f, T* part) {            \
    body::weighted_columns(m, e, f, part);                                                                          \
  }                                                                                                                 \
  [[maybe_unused]] MK_CLONES static void exact_columns(int64_t m, const T* s, T* top, T* part) {                   \
    body::exact_columns(m, s, top, part);                                                                           \
  }                                                                                                                 \
  [[maybe_unused]] MK_CLONES static void merge(int64_t n, T* top, T* sum, const T* top2, const T* sum2) {          \
    body::merge(n, top, sum, top2, sum2);                                                                           \
  }                                                                                                                 \
  [[maybe_unused]] MK_CLONES static void dscore(int64_t m, T* s, const DScore<T>& w) { body::dscore(m, s, w); }    \
  [[maybe_unused]] MK_CLONES static void row_sums(int64_t m, const T* s, T* sum) { body::row_sums(m, s, sum); }    \
  [[maybe_unused]] MK_CLONES static void col_sums(int64_t m, const T* s, T* sum) { body::col_sums(m, s, sum); }    \
  [[maybe_unused]] MK_CLONES static void softplus_rows(int64_t m, const T* s, T* sum) {                            \
    body::softplus_rows(m, s, sum);                                                                                 \
  }
MK_TILE_FUNCTIONS(float)
MK_TILE_FUNCTIONS(double)
#undef MK_TILE_FUNCTIONS

// Rounds to bf16 and interleaves rows 2p and 2p + 1 (VNNI order).
MK_CLONES static inline void to_vnni(int64_t pairs, const float* in, uint32_t* out) {
  for (int64_t p = 0; p < pairs; ++p)
    for (int64_t j = 0; j < kBlock; ++j)
      out[p * kBlock + j] = bf16_pair(in[2 * p * kBlock + j], in[(2 * p + 1) * kBlock + j]);
}

}  // namespace mk::tile
