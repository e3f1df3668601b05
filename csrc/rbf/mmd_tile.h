// MMD: a tile of inner products becomes kernel values, their sum, and gradients.
#pragma once

#include "kernel.h"

namespace mk::rbf {

template <class T>
struct TileWork {
  int64_t rows;
  T* s;                        // [rows][kBlock]: inner products on entry, gradients dL/d(r^2) * 2 on return
  const T *row_norm, *col_norm, *col_valid;
  const T* gamma;
  int64_t K;
  T slope;                     // factor of the gradients: -2 weight / K (gamma varies with the kernel)
  T *row_sum, *col_sum;        // accumulate the gradients in s
  double* gamma_sum;           // [K], accumulates r^2 k; may be null
  bool own;                    // row i of the tile is its column i
};

template <class T>
MK_INLINE double kernel_tile(const TileWork<T>& w) {
  T columns[kBlock] = {}, norm[kBlock], valid[kBlock];  // locals: no store can alias them
  // The sum of e = k - 1, accurately: `total` sums e of near pairs and k of far ones, which `far` counts.
  T total[kBlock] = {}, far[kBlock] = {};
  for (int64_t j = 0; j < kBlock; ++j) norm[j] = w.col_norm[j], valid[j] = w.col_valid[j];
  for (int64_t i = 0; i < w.rows; ++i) {
    T r[kBlock], slope[kBlock] = {};
    T* s = w.s + i * kBlock;
    squared_distances(w.row_norm[i], norm, s, r);
    for (int64_t k = 0; k < w.K; ++k) {
      const T g = w.gamma[k];
      T kernel[kBlock];
      for (int64_t j = 0; j < kBlock; ++j) {
        T k_j, e;
        exponentials(-g * r[j], k_j, e);
        // Factors of 0 and 1: GCC would make branches of choices between sums, and would not vectorise the loop.
        const T is_far = k_j < T(0.5) ? valid[j] : T(0);
        total[j] += k_j * is_far + e * (valid[j] - is_far);
        far[j] += is_far;
        kernel[j] = k_j * valid[j];
        slope[j] += g * kernel[j];
      }
      if (!w.gamma_sum) continue;
      T weighted = T(0);
#pragma omp simd reduction(+ : weighted)
      for (int64_t j = 0; j < kBlock; ++j) weighted += kernel[j] * r[j];
      w.gamma_sum[k] += weighted;
    }
    if (w.own) slope[i] = T(0);
    T sum = T(0);
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < kBlock; ++j) {
      const T v = slope[j] * w.slope;
      s[j] = v;
      columns[j] += v;
      sum += v;
    }
    w.row_sum[i] += sum;
  }
  for (int64_t j = 0; j < kBlock; ++j) w.col_sum[j] += columns[j];
  double found = 0;
  for (int64_t j = 0; j < kBlock; ++j) found += static_cast<double>(total[j]) - static_cast<double>(far[j]);
  return found;
}
[[maybe_unused]] MK_CLONES static double kernel_of_tile(const TileWork<float>& w) { return kernel_tile(w); }
[[maybe_unused]] MK_CLONES static double kernel_of_tile(const TileWork<double>& w) { return kernel_tile(w); }

}  // namespace mk::rbf
