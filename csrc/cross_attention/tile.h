// The elementwise steps of wide.h on a tile of scores [keys][kTile queries]; queries lie along the vector lanes.
#pragma once

#include "sparse.h"
#include "vec.h"

namespace mk::cross_attention {
inline namespace MK_ISA {
namespace body {

// The lanes, starting with query i, whose query may attend to key j.
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
  return mk::cross_attention::kept<T>(keys.r1, keys.r2, fill_word<T>(0x9e3779b9u * static_cast<uint32_t>(j)), dropout.threshold);
}

// Softmax: replaces S^T [n][kTile] of the keys from j by weights that are not yet divided by their sum, and rescales
// `out` [features][kTile] to the new maximum.
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

// Sparsemax: replaces S^T [n][kTile] of all keys by weights; writes the thresholds to rows.top and 1 to rows.sum.
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
    store(rows.top + c, statistic(found));
    store(rows.sum + c, zero + T(1));
  }
}

// For the keys from j: turns s = S^T into the weights that multiplied the values (after dropout), and d = dP^T into
// dS^T. rows.top holds the shift, rows.sum delta.
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
      if constexpr (Sparse) p = sparse_weight<T>(x);
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

// Sparsemax: rows.sum = the mean of dp over the support, from S^T and dP^T of all keys.
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
}  // namespace MK_ISA
}  // namespace mk::cross_attention
