// The elementwise parts of an LSTM step, forward and backward, in blocks of 16 units.
// mi_kernels/ops/lstm_scan/schema.py has the formulas.
#pragma once

#include <algorithm>

#include "../common/simd.h"

namespace mk::lstm_scan {

constexpr int64_t kUnits = 16;           // units of a panel of the recurrent weight
constexpr int64_t kPanel = 4 * kUnits;   // its columns: i, f, g, o of each unit

// x P(x^2) / Q(x^2), our own minimax fit on [0, 9]; the relative error is below 5e-7, also near 0. NaN propagates.
MK_INLINE float fast_tanh(float x) {
  const float y = x > 9.0f ? 9.0f : (x < -9.0f ? -9.0f : x), s = y * y;
  float p = 1.3354880119956574e-8f;
  p = p * s + 2.0609277946335746e-5f;
  p = p * s + 3.4956017603165147e-3f;
  p = p * s + 1.3381037732706136e-1f;
  p = p * s + 1.0f;
  float q = 7.776658796611176e-7f;
  q = q * s + 3.2856558642886224e-4f;
  q = q * s + 2.5877035954293314e-2f;
  q = q * s + 4.671435335236789e-1f;
  q = q * s + 1.0f;
  const float t = y * p / q;
  return t > 1.0f ? 1.0f : (t < -1.0f ? -1.0f : t);
}
MK_INLINE double fast_tanh(double x) { return std::tanh(x); }

// Prefetches by hand, because the hardware prefetcher sees no stream: steps of a row are adjacent in memory, but the
// rows of one step are far apart.
template <bool kWrite, class T>
MK_INLINE void prefetch(const T* p, int64_t n) {
#if defined(__GNUC__)
  for (int64_t j = 0; j < n; j += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + j, kWrite, 2);
#endif
}

// One row's slices of `n` units at one step. `z` holds W h as [i, f, g, o] of kUnits each; in `gates` and `activations`
// the four lie `gate` apart.
template <class T>
struct ForwardRow {
  const T *z, *gates, *bias, *c_before;
  T *activations, *h, *c, *h_next, *c_next;
  int64_t gate;
  bool more;  // another step follows
};

template <int64_t N, class T>
MK_INLINE void forward_units(int64_t n, const ForwardRow<T>& row) {
  T i[kUnits], f[kUnits], g[kUnits], o[kUnits], c[kUnits], h[kUnits];
  const int64_t w = N ? N : n;
  if (row.more) {
    for (int64_t k = 0; k < 4; ++k) prefetch<false>(row.gates + (4 + k) * row.gate, w);
    for (int64_t k = 0; row.activations && k < 4; ++k) prefetch<true>(row.activations + (4 + k) * row.gate, w);
    prefetch<true>(row.h + row.gate, w);
    prefetch<true>(row.c + row.gate, w);
  }
  for (int64_t j = 0; j < w; ++j) i[j] = sigmoid(row.z[j] + row.bias[j] + row.gates[j]);
  for (int64_t j = 0; j < w; ++j) f[j] = sigmoid(row.z[kUnits + j] + row.bias[kUnits + j] + row.gates[row.gate + j]);
  for (int64_t j = 0; j < w; ++j)
    g[j] = fast_tanh(row.z[2 * kUnits + j] + row.bias[2 * kUnits + j] + row.gates[2 * row.gate + j]);
  for (int64_t j = 0; j < w; ++j)
    o[j] = sigmoid(row.z[3 * kUnits + j] + row.bias[3 * kUnits + j] + row.gates[3 * row.gate + j]);
  for (int64_t j = 0; j < w; ++j) c[j] = f[j] * row.c_before[j] + i[j] * g[j];
  for (int64_t j = 0; j < w; ++j) h[j] = o[j] * fast_tanh(c[j]);
  for (int64_t j = 0; j < w; ++j) row.c[j] = row.c_next[j] = c[j];
  for (int64_t j = 0; j < w; ++j) row.h[j] = row.h_next[j] = h[j];
  if (!row.activations) return;
  for (int64_t j = 0; j < w; ++j) row.activations[j] = i[j];
  for (int64_t j = 0; j < w; ++j) row.activations[row.gate + j] = f[j];
  for (int64_t j = 0; j < w; ++j) row.activations[2 * row.gate + j] = g[j];
  for (int64_t j = 0; j < w; ++j) row.activations[3 * row.gate + j] = o[j];
}

// One row at one step. `dh` holds W^T d of time step t + 1. `dc` holds dc f of time step t + 1 and is overwritten by
// that of t. `d` and `kept` both receive the gradients of the four pre-activations.
template <class T>
struct BackwardRow {
  const T *activations, *c, *c_before, *g_h, *g_c, *dh;
  T *dc, *d, *kept;
  bool more;
};

template <int64_t N, class T>
MK_INLINE void backward_units(int64_t n, int64_t H, int64_t at, const BackwardRow<T>& row) {
  T d[4][kUnits], dc_before[kUnits];
  const T* a = row.activations + at;
  const int64_t w = N ? N : n;
  for (int64_t j = 0; j < w; ++j) {
    const T i = a[j], f = a[H + j], g = a[2 * H + j], o = a[3 * H + j];
    const T squashed = fast_tanh(row.c[at + j]), dh = row.dh[at + j] + row.g_h[at + j];
    const T dc = row.dc[at + j] + row.g_c[at + j] + dh * o * (T(1) - squashed * squashed);
    d[0][j] = dc * g * i * (T(1) - i);
    d[1][j] = dc * row.c_before[at + j] * f * (T(1) - f);
    d[2][j] = dc * i * (T(1) - g * g);
    d[3][j] = dh * squashed * o * (T(1) - o);
    dc_before[j] = dc * f;
  }
  for (int64_t j = 0; j < w; ++j) row.dc[at + j] = dc_before[j];
  for (int64_t k = 0; k < 4; ++k)
    for (int64_t j = 0; j < w; ++j) row.d[k * H + at + j] = row.kept[k * H + at + j] = d[k][j];
}

template <class T>
MK_INLINE void backward_row(int64_t H, const BackwardRow<T>& row) {
  if (row.more) {  // the previous time step, which the backward pass takes next
    prefetch<false>(row.activations - 4 * H, 4 * H);
    prefetch<false>(row.c_before - H, H);
    prefetch<false>(row.g_h - H, H);
    prefetch<true>(row.kept - 4 * H, 4 * H);
  }
  int64_t at = 0;
  for (; at + kUnits <= H; at += kUnits) backward_units<kUnits>(kUnits, H, at, row);
  if (at < H) backward_units<0>(H - at, H, at, row);
}

// Copies `columns` elements of each row, from column `at` on, into rows of kPanel elements, padded with zeros.
template <class T>
MK_INLINE void gather_columns(int64_t rows, int64_t columns, const T* const* in, int64_t at, T* out) {
  for (int64_t k = 0; k < rows; ++k) {
    for (int64_t j = 0; j < columns; ++j) out[k * kPanel + j] = in[k][at + j];
    for (int64_t j = columns; j < kPanel; ++j) out[k * kPanel + j] = T(0);
  }
}

// Plain functions, because target_clones does not work on templates.
#define MK_LSTM_CELLS(T)                                                                                             \
  [[maybe_unused]] MK_CLONES static void forward_cell(int64_t n, const ForwardRow<T>& row) {                         \
    n == kUnits ? forward_units<kUnits>(n, row) : forward_units<0>(n, row);                                          \
  }                                                                                                                  \
  [[maybe_unused]] MK_CLONES static void backward_cell(int64_t H, const BackwardRow<T>& row) {                       \
    backward_row(H, row);                                                                                            \
  }                                                                                                                  \
  [[maybe_unused]] MK_CLONES static void gather(int64_t rows, int64_t columns, const T* const* in, int64_t at,       \
                                                T* out) {                                                            \
    columns == kPanel ? gather_columns(rows, kPanel, in, at, out) : gather_columns(rows, columns, in, at, out);      \
  }
MK_LSTM_CELLS(float)
MK_LSTM_CELLS(double)
#undef MK_LSTM_CELLS

}  // namespace mk::lstm_scan
