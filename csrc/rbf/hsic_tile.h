// HSIC: two tiles of inner products become kernel values and their sums, or gradients.
#pragma once

#include <algorithm>

#include "kernel.h"

namespace mk::rbf {

template <class T>
struct Kernel {  // one sample's tile
  T* s;  // [rows][kBlock]: inner products, which the backward pass replaces by gradients
  const T *row_norm, *col_norm;
  T gamma;
};

template <class T>
struct Sums {
  T rows_e[kBlock], rows_f[kBlock];
  double cols_e[kBlock], cols_f[kBlock], products[3];  // products: sums of e f, e e and f f
};

template <class T>
MK_INLINE void kernel_row(const Kernel<T>& of, int64_t i, const T* norm, const T* valid, T* r, T* k, T* e) {
  squared_distances(of.row_norm[i], norm, of.s + i * kBlock, r);
  for (int64_t j = 0; j < kBlock; ++j) {
    exponentials(-of.gamma * r[j], k[j], e[j]);
    k[j] *= valid[j], e[j] *= valid[j];
  }
}

template <class T>
MK_INLINE T sum_row(const T* v) {
  T sum = T(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < kBlock; ++j) sum += v[j];
  return sum;
}

constexpr int64_t kRun = 8;  // rows summed in T, then doubles take over: HSIC is a small difference of the sums

template <class T>
MK_INLINE void sum_tile(int64_t rows, const Kernel<T>& x, const Kernel<T>& y, const T* valid_at, Sums<T>& out) {
  T norm_x[kBlock], norm_y[kBlock], valid[kBlock];  // locals: no store can alias them
  double cols_e[kBlock] = {}, cols_f[kBlock] = {}, total_ef[kBlock] = {}, total_ee[kBlock] = {}, total_ff[kBlock] = {};
  for (int64_t j = 0; j < kBlock; ++j) norm_x[j] = x.col_norm[j], norm_y[j] = y.col_norm[j], valid[j] = valid_at[j];
  for (int64_t first = 0; first < rows; first += kRun) {
    T sum_e[kBlock] = {}, sum_f[kBlock] = {}, ef[kBlock] = {}, ee[kBlock] = {}, ff[kBlock] = {};
    for (int64_t i = first; i < std::min(rows, first + kRun); ++i) {
      T r[kBlock], k[kBlock], e[kBlock], f[kBlock];
      kernel_row(x, i, norm_x, valid, r, k, e);
      kernel_row(y, i, norm_y, valid, r, k, f);
      for (int64_t j = 0; j < kBlock; ++j) {
        sum_e[j] += e[j], sum_f[j] += f[j];
        ef[j] += e[j] * f[j], ee[j] += e[j] * e[j], ff[j] += f[j] * f[j];
      }
      out.rows_e[i] = sum_row(e), out.rows_f[i] = sum_row(f);
    }
    for (int64_t j = 0; j < kBlock; ++j) {
      cols_e[j] += sum_e[j], cols_f[j] += sum_f[j];
      total_ef[j] += ef[j], total_ee[j] += ee[j], total_ff[j] += ff[j];
    }
  }
  for (double& p : out.products) p = 0;
  for (int64_t j = 0; j < kBlock; ++j) {
    out.cols_e[j] = cols_e[j], out.cols_f[j] = cols_f[j];
    out.products[0] += total_ef[j], out.products[1] += total_ee[j], out.products[2] += total_ff[j];
  }
}
[[maybe_unused]] MK_CLONES static void sums_of_tile(int64_t rows, const Kernel<float>& x, const Kernel<float>& y,
                                                    const float* valid, Sums<float>& out) {
  sum_tile(rows, x, y, valid, out);
}
[[maybe_unused]] MK_CLONES static void sums_of_tile(int64_t rows, const Kernel<double>& x, const Kernel<double>& y,
                                                    const double* valid, Sums<double>& out) {
  sum_tile(rows, x, y, valid, out);
}

template <class T>
struct Means {  // of each row of E and F, and of all entries
  const T *row_e, *row_f, *col_e, *col_f;
  T e, f;
};

template <class T>
struct Slopes {  // a tile's gradients with respect to the entries of (E, F): their factors, and where their sums go
  T cross, own_x, own_y;  // gradients of the three traces
  T factor;               // -2, or -4 for a pair of unlike tiles
  bool own;               // row i of the tile is its column i
  T *row_x, *col_x, *row_y, *col_y;
  double gamma_x, gamma_y;  // sums of gradient * r^2, without constant factors
};

template <class T>
MK_INLINE void finish_row(const T* of_exponent, T factor, T* s, T* columns, T& row) {
  T sum = T(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < kBlock; ++j) {
    const T v = of_exponent[j] * factor;
    s[j] = v;
    columns[j] += v;
    sum += v;
  }
  row += sum;
}

template <class T>
MK_INLINE void slope_tile(int64_t rows, const Kernel<T>& x, const Kernel<T>& y, const T* valid_at, const Means<T>& m,
                          Slopes<T>& out) {
  T norm_x[kBlock], norm_y[kBlock], valid[kBlock], col_e[kBlock], col_f[kBlock];
  T columns_x[kBlock] = {}, columns_y[kBlock] = {}, along_x[kBlock] = {}, along_y[kBlock] = {};
  for (int64_t j = 0; j < kBlock; ++j) {
    norm_x[j] = x.col_norm[j], norm_y[j] = y.col_norm[j], valid[j] = valid_at[j];
    col_e[j] = m.col_e[j] - m.e, col_f[j] = m.col_f[j] - m.f;
  }
  for (int64_t i = 0; i < rows; ++i) {
    T r_x[kBlock], r_y[kBlock], k[kBlock], l[kBlock], e[kBlock], f[kBlock], of_e[kBlock], of_f[kBlock];
    kernel_row(x, i, norm_x, valid, r_x, k, e);
    kernel_row(y, i, norm_y, valid, r_y, l, f);
    for (int64_t j = 0; j < kBlock; ++j) {
      const T he = e[j] - m.row_e[i] - col_e[j], hf = f[j] - m.row_f[i] - col_f[j];
      of_e[j] = (out.cross * hf + T(2) * out.own_x * he) * k[j];
      of_f[j] = (out.cross * he + T(2) * out.own_y * hf) * l[j];
      along_x[j] += of_e[j] * r_x[j], along_y[j] += of_f[j] * r_y[j];
    }
    if (out.own) of_e[i] = of_f[i] = T(0);
    finish_row(of_e, out.factor * x.gamma, x.s + i * kBlock, columns_x, out.row_x[i]);
    finish_row(of_f, out.factor * y.gamma, y.s + i * kBlock, columns_y, out.row_y[i]);
  }
  out.gamma_x = out.gamma_y = 0;
  for (int64_t j = 0; j < kBlock; ++j) {
    out.col_x[j] += columns_x[j], out.col_y[j] += columns_y[j];
    out.gamma_x += along_x[j], out.gamma_y += along_y[j];
  }
}
[[maybe_unused]] MK_CLONES static void slopes_of_tile(int64_t rows, const Kernel<float>& x, const Kernel<float>& y,
                                                      const float* valid, const Means<float>& means,
                                                      Slopes<float>& out) {
  slope_tile(rows, x, y, valid, means, out);
}
[[maybe_unused]] MK_CLONES static void slopes_of_tile(int64_t rows, const Kernel<double>& x, const Kernel<double>& y,
                                                      const double* valid, const Means<double>& means,
                                                      Slopes<double>& out) {
  slope_tile(rows, x, y, valid, means, out);
}

}  // namespace mk::rbf
