// Heads of more than 8 features, and all heads in fp64: matrix products on tiles of kTile keys x kTile queries. Queries
// lie along the vector lanes, so that maxima, sums and thresholds are elementwise.
//
// Forward: S^T = K Q^T, P^T = exp2(S^T - running maximum), O^T = rescaled O^T + V^T P^T. Sparsemax keeps S^T of all
// keys for kTile queries and finds the thresholds first. Backward, per tile: recomputes S^T, computes dP^T = V G^T,
// then dV += P^T G, dK += dS^T Q, dQ += dS K. 2 (E + Ev) FLOPs per weight forward, 2 (3 E + 2 Ev) backward.
#pragma once

#include "../common/gemm.h"
#include "pack.h"

namespace mk::cross_attention {

inline int64_t padded_width(int64_t features) { return round_up(features, 16); }

template <class T>
int64_t wide_scratch(const Item<T>& it, bool backward) {
  const int64_t keys = round_up(it.Tk, kTile), all = it.sparse ? keys : kTile;
  const int64_t E = padded_width(it.E), Ev = padded_width(it.Ev);
  if (!backward) return keys * (E + Ev + kTile) + kTile * (E + Ev + all + 4) + 512;
  return keys * 2 * (E + Ev) + kTile * (4 * E + 3 * Ev + 2 * all + kTile + 4) + 512;
}

template <class T>
void wide_forward(const Item<T>& it, const Kernels<T>& with, Scratch<T>& scratch) {
  std::fill_n(it.out, it.Tq * it.Ev, T(0));
  std::fill_n(it.stat, it.Tq, -minus_infinity<T>());
  const int64_t reached = it.reached(), length = round_up(reached, kTile);
  const T factor = it.sparse ? T(1) : static_cast<T>(1.4426950408889634);
  T *k = scratch.take(reached * it.E), *vt = scratch.take(length * it.Ev), *qt = scratch.take(kTile * it.E);
  T *out = scratch.take(kTile * it.Ev), *s = scratch.take(kTile * (it.sparse ? length : kTile));
  T *z = scratch.take(it.sparse ? reached * kMostLanes : 0), *top = scratch.take(kTile), *sum = scratch.take(kTile);
  auto* index = reinterpret_cast<int32_t*>(scratch.take(it.sparse ? reached : 0));
  pack_rows(it.key, 0, reached, it.E, it.E, T(1), k);
  pack_columns(it.value, 0, reached, it.Ev, length, static_cast<T>(it.dropout.inverse), vt);
  for (int64_t i = it.first_query(); i < it.queries; i += kTile) {
    const int64_t n = std::min(kTile, it.queries - i), keys = it.allowed(i + n - 1);
    const TileRows<T> rows{i, n, top, sum};
    pack_columns(it.query, i, n, it.E, kTile, it.scale * factor, qt);
    std::fill_n(top, kTile, minus_infinity<T>());
    std::fill_n(sum, kTile, T(0));
    auto scores = [&](int64_t j, int64_t m, T* to) { gemm(m, kTile, it.E, it.E, kTile, kTile, false, k + j * it.E, qt, to); };
    auto outputs = [&](int64_t j, int64_t m, const T* p) {
      gemm(it.Ev, kTile, m, length, kTile, kTile, j > 0, vt + j, p, out);
    };
    for (int64_t j = 0; j < keys; j += kTile) {
      const int64_t m = std::min(kTile, keys - j);
      scores(j, m, it.sparse ? s + j * kTile : s);
      if (it.sparse) continue;
      with.soften(it, rows, j, m, it.Ev, s, out);
      outputs(j, m, s);
    }
    if (it.sparse) {
      with.sparsify(it, rows, keys, s, z, index);
      for (int64_t j = 0; j < keys; j += kTile) outputs(j, std::min(kTile, keys - j), s + j * kTile);
    }
    for (int64_t c = 0; c < n; ++c) {
      const T inverse = T(1) / sum[c];
      for (int64_t e = 0; e < it.Ev; ++e) it.out[(i + c) * it.Ev + e] = out[e * kTile + c] * inverse;
      it.stat[i + c] = it.sparse ? top[c] : (top[c] + std::log2(sum[c])) * static_cast<T>(0.6931471805599453);
    }
  }
}

template <class T>
void wide_backward(const Item<T>& it, const Kernels<T>& with, Scratch<T>& scratch) {
  const int64_t first = it.first_query(), reached = it.reached(), length = round_up(reached, kTile);
  const int64_t E = padded_width(it.E), Ev = padded_width(it.Ev);
  const T factor = it.sparse ? T(1) : static_cast<T>(1.4426950408889634), inverse = static_cast<T>(it.dropout.inverse);
  std::fill_n(it.dq, first * it.E, T(0));
  std::fill_n(it.dq + it.queries * it.E, (it.Tq - it.queries) * it.E, T(0));
  T *k = scratch.take(length * E), *v = scratch.take(length * Ev), *dk = scratch.take(length * E);
  T *dv = scratch.take(length * Ev), *q = scratch.take(kTile * E), *qt = scratch.take(kTile * E);
  T *g = scratch.take(kTile * Ev), *gt = scratch.take(kTile * Ev), *dq = scratch.take(kTile * E);
  T *s = scratch.take(kTile * (it.sparse ? length : kTile)), *d = scratch.take(kTile * (it.sparse ? length : kTile));
  T *turned = scratch.take(kTile * kTile), *shift = scratch.take(kTile), *delta = scratch.take(kTile);
  pack_rows(it.key, 0, reached, it.E, E, T(1), k);
  pack_rows(it.value, 0, reached, it.Ev, Ev, T(1), v);
  std::fill_n(dk, length * E, T(0));
  std::fill_n(dv, length * Ev, T(0));
  for (int64_t i = first; i < it.queries; i += kTile) {
    const int64_t n = std::min(kTile, it.queries - i), keys = it.allowed(i + n - 1);
    const TileRows<T> rows{i, n, shift, delta};
    pack_rows(it.query, i, n, it.E, E, it.scale * factor, q);
    std::fill(q + n * E, q + kTile * E, T(0));
    pack_columns(it.query, i, n, it.E, kTile, it.scale * factor, qt);
    pack_rows(it.grad_out, i, n, it.Ev, Ev, inverse, g);
    std::fill(g + n * Ev, g + kTile * Ev, T(0));
    pack_columns(it.grad_out, i, n, it.Ev, kTile, inverse, gt);
    std::fill_n(shift, kTile, -minus_infinity<T>());
    std::fill_n(delta, kTile, T(0));
    for (int64_t c = 0; c < n; ++c) {
      shift[c] = it.stat[i + c] * factor;
      for (int64_t e = 0; e < it.Ev; ++e) delta[c] += g[c * Ev + e] * it.out[(i + c) * it.Ev + e];
      delta[c] /= inverse;
    }
    auto tile = [&](int64_t j) { return it.sparse ? j * kTile : 0; };
    auto again = [&](int64_t j, int64_t m) {
      gemm(m, kTile, it.E, E, kTile, kTile, false, k + j * E, qt, s + tile(j));
      gemm(m, kTile, it.Ev, Ev, kTile, kTile, false, v + j * Ev, gt, d + tile(j));
    };
    if (it.sparse) {
      for (int64_t j = 0; j < keys; j += kTile) again(j, std::min(kTile, keys - j));
      with.support_means(it, rows, keys, s, d);
    }
    for (int64_t j = 0; j < keys; j += kTile) {
      const int64_t m = std::min(kTile, keys - j);
      T *p = s + tile(j), *ds = d + tile(j);
      if (!it.sparse) again(j, m);
      with.differentiate(it, rows, j, m, p, ds);
      gemm(m, Ev, kTile, kTile, Ev, Ev, true, p, g, dv + j * Ev);
      gemm(m, E, kTile, kTile, E, E, true, ds, q, dk + j * E);
      with.transpose(m, ds, turned);
      gemm(kTile, E, m, kTile, E, E, j > 0, turned, k + j * E, dq);
    }
    for (int64_t c = 0; c < n; ++c)
      for (int64_t e = 0; e < it.E; ++e) it.dq[(i + c) * it.E + e] = dq[c * E + e] * it.scale;
  }
  auto unpack = [&](const T* from, int64_t features, int64_t width, T times, T* to) {
    for (int64_t j = 0; j < reached; ++j)
      for (int64_t e = 0; e < features; ++e) to[j * features + e] = from[j * width + e] * times;
    std::fill(to + reached * features, to + it.Tk * features, T(0));
  };
  unpack(dk, it.E, E, T(1) / factor, it.dk);
  unpack(dv, it.Ev, Ev, T(1), it.dv);
}

template <class T>
void run_wide(const Item<T>& it, const Kernels<T>& with, bool backward, Scratch<T>& scratch) {
  backward ? wide_backward(it, with, scratch) : wide_forward(it, with, scratch);
}

}  // namespace mk::cross_attention
