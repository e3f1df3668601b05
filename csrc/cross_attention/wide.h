// Heads of more than 16 features: products of tiles of kTile keys x kTile queries, the queries along the vector lanes, so
// that maxima, sums and thresholds are elementwise.
//
// Forward: S^T = K Q^T, P^T = exp2(S^T - running maximum), O^T = rescaled O^T + V^T P^T. Sparsemax keeps S^T of all keys for
// kTile queries and finds the thresholds first. Backward, per tile: S^T and dP^T = V G^T again, then dV += P^T G,
// dK += dS^T Q, dQ += dS K. 2 (E + Ev) FLOPs per weight forward, 2 (3 E + 2 Ev) backward.
#pragma once

#include "../common/gemm.h"
#include "item.h"
#include "sparse.h"
#include "vec.h"

namespace mk::attention {

constexpr int64_t kTile = 64;

inline int64_t padded_width(int64_t features) { return round_up(features, 16); }

template <class T>
int64_t wide_scratch(const Item<T>& it, bool backward) {
  const int64_t keys = round_up(it.Tk, kTile), all = it.sparse ? keys : kTile;
  const int64_t E = padded_width(it.E), Ev = padded_width(it.Ev);
  if (!backward) return keys * (E + Ev + kTile) + kTile * (E + Ev + all + 4) + 512;
  return keys * 2 * (E + Ev) + kTile * (4 * E + 3 * Ev + 2 * all + kTile + 4) + 512;
}

// What the elementwise steps of a tile know of its rows: the queries along the lanes.
template <class T>
struct TileRows {
  int64_t first, n;  // queries
  T *top, *sum;      // [kTile]: forward, the running maximum and sum; backward, the shift and delta
};

namespace body {

// Lanes of queries from `i` on that may look at key j.
template <class T>
MK_INLINE IntVec<T> sees(const Item<T>& it, int64_t i, int64_t j) {
  const int64_t gap = std::clamp<int64_t>(j - it.offset - i, -1, kLanes<T>);
  return iota<T>(0) >= static_cast<typename Lanes<T>::Int>(gap);
}

template <class T>
struct LaneKeys {
  WordVec<T> r1, r2;
};
template <class T>
MK_INLINE LaneKeys<T> lane_keys(const Dropout& dropout, int64_t i) {
  LaneKeys<T> keys;
  for (int64_t l = 0; l < kLanes<T>; ++l) {
    const RowKey key = row_key(dropout.key, i + l);
    keys.r1[l] = key.r1, keys.r2[l] = key.r2;
  }
  return keys;
}
template <class T>
MK_INLINE IntVec<T> kept(const LaneKeys<T>& keys, const Dropout& dropout, int64_t j) {
  return mk::attention::kept<T>(keys.r1, keys.r2, fill_word<T>(0x9e3779b9u * static_cast<uint32_t>(j)), dropout.threshold);
}

// S^T [n][kTile] of keys j.. -> weights before the division by their sum; `out` [features][kTile] is rescaled.
template <class T>
MK_INLINE void soften(const Item<T>& it, const TileRows<T>& rows, int64_t j, int64_t n, int64_t features, T* s, T* out) {
  const Vec<T> zero = fill(T(0)), low = fill(minus_infinity<T>());
  for (int64_t c = 0; c < kTile; c += kLanes<T>) {
    const int64_t i = rows.first + c;
    const bool masked = it.allowed(i) < j + n;
    const Vec<T> before = load(rows.top + c);
    Vec<T> top = before, sum = zero;
    for (int64_t r = 0; r < n; ++r) {
      Vec<T> x = load(s + r * kTile + c);
      if (masked) {
        x = sees(it, i, j + r) ? x : low;
        store(s + r * kTile + c, x);
      }
      top = larger<T>(top, x);
    }
    const Vec<T> base = top == low ? zero : top;
    const Vec<T> shrink = exp2_lanes(before - base);
    LaneKeys<T> keys;
    if (it.dropout.on) keys = lane_keys<T>(it.dropout, i);
    for (int64_t r = 0; r < n; ++r) {
      const Vec<T> x = load(s + r * kTile + c);
      Vec<T> p = exp2_lanes(x - base);
      if (masked) p = x == low ? zero : p;
      sum += p;
      if (it.dropout.on) p = kept<T>(keys, it.dropout, j + r) ? p : zero;
      store(s + r * kTile + c, p);
    }
    store(rows.top + c, top);
    store(rows.sum + c, load(rows.sum + c) * shrink + sum);
    if (j == 0 || !any<T>(top > before)) continue;
    for (int64_t e = 0; e < features; ++e) store(out + e * kTile + c, load(out + e * kTile + c) * shrink);
  }
}

// S^T [n][kTile] of all keys -> sparsemax's weights; the thresholds go to rows.top, 1 to rows.sum.
template <class T>
MK_INLINE void sparsify(const Item<T>& it, const TileRows<T>& rows, int64_t n, T* s, T* z, int32_t* index) {
  const Vec<T> zero = fill(T(0)), low = fill(minus_infinity<T>());
  for (int64_t c = 0; c < kTile; c += kLanes<T>) {
    const int64_t i = rows.first + c;
    for (int64_t r = it.allowed(i); r < n; ++r)
      store(s + r * kTile + c, sees(it, i, r) ? load(s + r * kTile + c) : low);
    const Threshold<T> found = threshold<T>(n, s + c, kTile, z, index);
    LaneKeys<T> keys;
    if (it.dropout.on) keys = lane_keys<T>(it.dropout, i);
    for (int64_t r = 0; r < n; ++r) {
      Vec<T> p = larger<T>((load(s + r * kTile + c) - found.top) - found.tau, zero);
      if (it.dropout.on) p = kept<T>(keys, it.dropout, r) ? p : zero;
      store(s + r * kTile + c, p);
    }
    store(rows.top + c, found.top + found.tau);
    store(rows.sum + c, zero + T(1));
  }
}

// s = S^T, d = dP^T of keys j.. -> s = the weights that met the values, d = dS^T; rows.top is the shift, rows.sum delta.
template <class T, bool Sparse>
MK_INLINE void differentiate(const Item<T>& it, const TileRows<T>& rows, int64_t j, int64_t n, T* s, T* d) {
  const Vec<T> zero = fill(T(0));
  for (int64_t c = 0; c < kTile; c += kLanes<T>) {
    const int64_t i = rows.first + c;
    const bool masked = it.allowed(i) < j + n;
    const Vec<T> shift = load(rows.top + c), delta = load(rows.sum + c);
    LaneKeys<T> keys;
    if (it.dropout.on) keys = lane_keys<T>(it.dropout, i);
    for (int64_t r = 0; r < n; ++r) {
      const Vec<T> x = load(s + r * kTile + c) - shift;
      Vec<T> p;
      if constexpr (Sparse) p = larger<T>(x, zero);
      else p = exp2_lanes(x);
      if (masked) p = sees(it, i, j + r) ? p : zero;
      Vec<T> dp = load(d + r * kTile + c), shown = p;
      if (it.dropout.on) {
        const IntVec<T> keep = kept<T>(keys, it.dropout, j + r);
        dp = keep ? dp : zero;
        shown = keep ? p : zero;
      }
      if constexpr (Sparse) dp = p > zero ? dp - delta : zero;
      else dp = p * (dp - delta);
      store(s + r * kTile + c, shown);
      store(d + r * kTile + c, dp);
    }
  }
}

// rows.sum = the mean of dp over sparsemax's support, from S^T and dP^T of all keys.
template <class T>
MK_INLINE void support_means(const Item<T>& it, const TileRows<T>& rows, int64_t n, const T* s, const T* d) {
  const Vec<T> zero = fill(T(0));
  for (int64_t c = 0; c < kTile; c += kLanes<T>) {
    const int64_t i = rows.first + c, full = it.allowed(i);
    const Vec<T> shift = load(rows.top + c);
    Vec<T> sum = zero, size = zero;
    LaneKeys<T> keys;
    if (it.dropout.on) keys = lane_keys<T>(it.dropout, i);
    for (int64_t r = 0; r < n; ++r) {
      IntVec<T> support = load(s + r * kTile + c) > shift;
      if (r >= full) support &= sees(it, i, r);
      size += support ? zero + T(1) : zero;
      if (it.dropout.on) support &= kept<T>(keys, it.dropout, r);
      sum += support ? load(d + r * kTile + c) : zero;
    }
    store(rows.sum + c, sum / larger<T>(size, zero + T(1)));
  }
}

// [n][kTile] -> [kTile][kTile]
template <class T>
MK_INLINE void transpose(int64_t n, const T* in, T* out) {
  constexpr int64_t L = 8;
  for (int64_t c = 0; c < kTile; c += L)
    for (int64_t r = 0; r < n; ++r)
      for (int64_t l = 0; l < L; ++l) out[(c + l) * kTile + r] = in[r * kTile + c + l];
}

}  // namespace body

#define MK_WIDE(T)                                                                                                    \
  MK_CLONES static void soften(const Item<T>& it, const TileRows<T>& rows, int64_t j, int64_t n, int64_t features,    \
                               T* s, T* out) {                                                                        \
    body::soften(it, rows, j, n, features, s, out);                                                                   \
  }                                                                                                                   \
  MK_CLONES static void sparsify(const Item<T>& it, const TileRows<T>& rows, int64_t n, T* s, T* z, int32_t* index) { \
    body::sparsify(it, rows, n, s, z, index);                                                                         \
  }                                                                                                                   \
  MK_CLONES static void differentiate(const Item<T>& it, const TileRows<T>& rows, int64_t j, int64_t n, T* s, T* d) { \
    it.sparse ? body::differentiate<T, true>(it, rows, j, n, s, d)                                                    \
              : body::differentiate<T, false>(it, rows, j, n, s, d);                                                  \
  }                                                                                                                   \
  MK_CLONES static void support_means(const Item<T>& it, const TileRows<T>& rows, int64_t n, const T* s, const T* d) { \
    body::support_means(it, rows, n, s, d);                                                                           \
  }                                                                                                                   \
  MK_CLONES static void transpose(int64_t n, const T* in, T* out) { body::transpose(n, in, out); }
MK_WIDE(float)
MK_WIDE(double)
#undef MK_WIDE

template <class T>
void wide_forward(const Item<T>& it, Scratch<T>& scratch) {
  std::fill_n(it.out, it.Tq * it.Ev, T(0));
  std::fill_n(it.stat, it.Tq, -minus_infinity<T>());
  const int64_t reached = it.reached(), length = round_up(reached, kTile);
  const T factor = it.sparse ? T(1) : static_cast<T>(kLog2e);
  T *k = scratch.take(reached * it.E), *vt = scratch.take(length * it.Ev), *qt = scratch.take(kTile * it.E);
  T *out = scratch.take(kTile * it.Ev), *s = scratch.take(kTile * (it.sparse ? length : kTile));
  T *z = scratch.take(it.sparse ? reached * kLanes<T> : 0), *top = scratch.take(kTile), *sum = scratch.take(kTile);
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
      soften(it, rows, j, m, it.Ev, s, out);
      outputs(j, m, s);
    }
    if (it.sparse) {
      sparsify(it, rows, keys, s, z, index);
      for (int64_t j = 0; j < keys; j += kTile) outputs(j, std::min(kTile, keys - j), s + j * kTile);
    }
    for (int64_t c = 0; c < n; ++c) {
      const T inverse = T(1) / sum[c];
      for (int64_t e = 0; e < it.Ev; ++e) it.out[(i + c) * it.Ev + e] = out[e * kTile + c] * inverse;
      it.stat[i + c] = it.sparse ? top[c] : (top[c] + std::log2(sum[c])) * static_cast<T>(kLn2);
    }
  }
}

template <class T>
void wide_backward(const Item<T>& it, Scratch<T>& scratch) {
  const int64_t first = it.first_query(), reached = it.reached(), length = round_up(reached, kTile);
  const int64_t E = padded_width(it.E), Ev = padded_width(it.Ev);
  const T factor = it.sparse ? T(1) : static_cast<T>(kLog2e), inverse = static_cast<T>(it.dropout.inverse);
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
      support_means(it, rows, keys, s, d);
    }
    for (int64_t j = 0; j < keys; j += kTile) {
      const int64_t m = std::min(kTile, keys - j);
      T *p = s + tile(j), *ds = d + tile(j);
      if (!it.sparse) again(j, m);
      differentiate(it, rows, j, m, p, ds);
      gemm(m, Ev, kTile, kTile, Ev, Ev, true, p, g, dv + j * Ev);
      gemm(m, E, kTile, kTile, E, E, true, ds, q, dk + j * E);
      transpose(m, ds, turned);
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
void run_wide(const Item<T>& it, bool backward, Scratch<T>& scratch) {
  backward ? wide_backward(it, scratch) : wide_forward(it, scratch);
}

}  // namespace mk::attention
