// Heads of at most 8 features in fp32. In matrix products of this size overhead would dominate, so everything stays in
// registers.
//
// Forward: as many queries along the lanes as a register holds (up to 16); keys are broadcast one after the other. A
// weight takes E multiplications for the score, an exp2, and Ev multiplications for the output. No maximum is
// subtracted if the Cauchy-Schwarz inequality guarantees that exp2 stays in range. Sparsemax keeps the scores of these
// queries and finds their thresholds (sparse.h).
//
// Backward: up to 16 keys along the lanes with their gradients in registers; eight queries are broadcast one after the
// other. The score gradients of these eight rows stay in L1 for a second loop that sums dq. 4 (E + Ev) + 2 E FLOPs and
// one exp2 per weight.
#pragma once

#include "pack.h"
#include "sparse.h"
#include "vec.h"

#define MK_LAMBDA __attribute__((always_inline))
// Keeps every variant a separate function: compile time grows much faster than a function's size.
#define MK_NOINLINE __attribute__((noinline))

namespace mk::cross_attention {

inline namespace MK_ISA {
constexpr int64_t kRows = 8;

namespace body {

template <class T>
constexpr T score_factor(bool sparse) {
  return sparse ? T(1) : static_cast<T>(kLog2e);
}

// Transposes: writes lane l of acc[e] to out[l][e].
template <class T, int P>
MK_INLINE void scatter(const Vec<T>* acc, int64_t n, int64_t width, T* out) {
  T columns[P][kLanes<T>];
  for (int e = 0; e < P; ++e) store(columns[e], acc[e]);
  for (int64_t l = 0; l < n; ++l)
    for (int64_t e = 0; e < width; ++e) out[l * width + e] = columns[e][l];
}

template <class T, int P, bool Sparse, bool Drop>
MK_NOINLINE void small_forward(const Item<T>& it, Scratch<T>& scratch) {
  constexpr int64_t L = kLanes<T>;
  const int64_t first = it.first_query(), reached = it.reached();
  set(it.out, it.Tq * it.Ev, T(0));
  set(it.stat, it.Tq, -minus_infinity<T>());
  if (first >= it.queries) return;
  T *k = scratch.take(reached * P), *v = scratch.take(reached * P), *s = nullptr, *z = nullptr;
  int32_t* index = nullptr;
  if constexpr (Sparse) {
    s = scratch.take(reached * L), z = scratch.take(reached * L);
    index = reinterpret_cast<int32_t*>(scratch.take(reached));
  }
  pack_rows(it.key, 0, reached, it.E, P, T(1), k);
  pack_rows(it.value, 0, reached, it.Ev, P, static_cast<T>(Drop ? it.dropout.inverse : 1.0), v);
  T longest = 0;
  for (int64_t j = 0; j < reached; ++j) {
    T norm = 0;
    for (int e = 0; e < P; ++e) norm += k[j * P + e] * k[j * P + e];
    longest = norm > longest ? norm : longest;
  }
  for (int64_t i = first; i < it.queries; i += L) {
    const int64_t n = std::min(L, it.queries - i), full = it.allowed(i), all = it.allowed(i + n - 1);
    T columns[P * L];
    pack_columns(it.query, i, n, it.E, L, it.scale * score_factor<T>(Sparse), columns);
    Vec<T> q[P], acc[P], sum = fill(T(0));
    for (int e = 0; e < P; ++e) q[e] = e < it.E ? load(columns + e * L) : fill(T(0)), acc[e] = fill(T(0));
    WordVec<T> r1, r2;
    if constexpr (Drop)
      for (int64_t l = 0; l < L; ++l) {
        const RowKey key = row_key(it.dropout.key, i + l);
        r1[l] = key.r1, r2[l] = key.r2;
      }
    const IntVec<T> lane = iota<T>(0);
    auto score = [&](int64_t j, Vec<T> x) MK_LAMBDA {
      for (int e = 0; e < P; ++e) x += q[e] * k[j * P + e];
      return x;
    };
    // Lanes whose query may attend to key j >= full.
    auto visible = [&](int64_t j) MK_LAMBDA { return lane >= static_cast<typename Lanes<T>::Int>(j - full + 1); };
    auto add = [&](int64_t j, Vec<T> p) MK_LAMBDA {
      if constexpr (Drop)
        p = kept<T>(r1, r2, fill_word<T>(0x9e3779b9u * static_cast<uint32_t>(j)), it.dropout.threshold) ? p : fill(T(0));
      for (int e = 0; e < P; ++e) acc[e] += p * v[j * P + e];
    };
    Vec<T> stat;
    if constexpr (Sparse) {
      const Vec<T> zero = fill(T(0));
      for (int64_t j = 0; j < full; ++j) store(s + j * L, score(j, zero));
      for (int64_t j = full; j < all; ++j)
        store(s + j * L, visible(j) ? score(j, zero) : fill(minus_infinity<T>()));
      const Threshold<T> found = threshold<T>(all, s, L, z, index);
      for (int64_t m = 0; m < found.candidates; ++m)
        add(index[m], larger<T>(load(z + m * L) - found.tau, zero));
      stat = statistic(found);
    } else {
      Vec<T> top = fill(T(0)), bound = fill(T(0));
      for (int e = 0; e < P; ++e) bound += q[e] * q[e];
      if (any<T>(!(bound * longest <= T(3600)))) {
        top = fill(minus_infinity<T>());
        for (int64_t j = 0; j < full; ++j) top = larger<T>(top, score(j, fill(T(0))));
        for (int64_t j = full; j < all; ++j) top = larger<T>(top, visible(j) ? score(j, fill(T(0))) : top);
      }
      for (int64_t j = 0; j < full; ++j) {
        const Vec<T> p = exp2_lanes(score(j, -top));
        sum += p;
        add(j, p);
      }
      for (int64_t j = full; j < all; ++j) {
        const Vec<T> p = visible(j) ? exp2_lanes(score(j, -top)) : fill(T(0));
        sum += p;
        add(j, p);
      }
      for (int64_t l = 0; l < L; ++l) stat[l] = (top[l] + std::log2(sum[l])) * static_cast<T>(kLn2);
      const Vec<T> inverse = T(1) / sum;
      for (int e = 0; e < P; ++e) acc[e] *= inverse;
    }
    scatter<T, P>(acc, n, it.Ev, it.out + i * it.Ev);
    for (int64_t l = 0; l < n; ++l) it.stat[i + l] = stat[l];
  }
}

// dq of up to four queries from their score gradients [4][length].
template <class T, int P, int Rows>
MK_INLINE void query_gradients(int64_t n, const T* ds, const T* kt, int64_t length, int64_t width, T scale, T* dq) {
  Vec<T> acc[Rows][P];
  for (int r = 0; r < Rows; ++r)
    for (int e = 0; e < P; ++e) acc[r][e] = fill(T(0));
  for (int64_t j = 0; j < n; j += kLanes<T>) {
    Vec<T> d[Rows];
    for (int r = 0; r < Rows; ++r) d[r] = load(ds + r * length + j);
    for (int e = 0; e < P; ++e) {
      const Vec<T> k = load(kt + e * length + j);
      for (int r = 0; r < Rows; ++r) acc[r][e] += d[r] * k;
    }
  }
  for (int r = 0; r < Rows; ++r) {
    T sums[P];
    for (int e = 0; e < P; ++e) sums[e] = sum_lanes(acc[r][e]) * scale;
    for (int64_t e = 0; e < width; ++e) dq[r * width + e] = sums[e];
  }
}

template <class T, int P, bool Sparse, bool Drop>
struct Backward {
  static constexpr int64_t L = kLanes<T>;
  struct Row {
    const T *q, *g;
    T shift, delta;
    RowKey key;
    int64_t allowed;
  };
  const Item<T>& it;
  int64_t length;
  T *q, *g, *kt, *vt, *dkt, *dvt, *ds;
  Row rows[kRows];

  MK_INLINE Vec<T> weight(const Row& row, const Vec<T>* k) const {
    // Sparsemax's scores must equal those of the forward bit for bit: if scores are large, the support depends on it.
    Vec<T> x = fill(Sparse ? T(0) : -row.shift);
    for (int e = 0; e < P; ++e) x += row.q[e] * k[e];
    if constexpr (Sparse) return sparse_weight<T>(x - row.shift);
    else return exp2_lanes(x);
  }
  MK_INLINE Vec<T> weight_gradient(const Row& row, const Vec<T>* v) const {
    Vec<T> dp = row.g[0] * v[0];
    for (int e = 1; e < P; ++e) dp += row.g[e] * v[e];
    return dp;
  }
  MK_INLINE IntVec<T> is_kept(const Row& row, WordVec<T> golden) const {
    return kept<T>(fill_word<T>(row.key.r1), fill_word<T>(row.key.r2), golden, it.dropout.threshold);
  }
  MK_INLINE IntVec<T> visible(const Row& row, int64_t j) const {
    return iota<T>(0) < static_cast<typename Lanes<T>::Int>(std::min<int64_t>(row.allowed - j, L));
  }

  // Sparsemax: the mean of dp over the support.
  MK_INLINE T support_mean(const Row& row) const {
    const Vec<T> zero = fill(T(0));
    Vec<T> sum = zero, size = zero;
    for (int64_t j = 0; j < row.allowed; j += L) {
      Vec<T> k[P], v[P];
      for (int e = 0; e < P; ++e) k[e] = load(kt + e * length + j);
      const IntVec<T> support = (weight(row, k) > zero) & visible(row, j);
      if (!any<T>(support)) continue;
      for (int e = 0; e < P; ++e) v[e] = load(vt + e * length + j);
      IntVec<T> counts = support;
      if constexpr (Drop) counts &= is_kept(row, golden_lanes<T>(j));
      sum += counts ? weight_gradient(row, v) : zero;
      size += support ? zero + T(1) : zero;
    }
    return sum_lanes(sum) / std::max(T(1), sum_lanes(size));
  }

  template <bool Masked>
  MK_INLINE void key_vector(int64_t j, int64_t n) {
    const Vec<T> zero = fill(T(0));
    Vec<T> k[P], v[P], dk[P], dv[P];
    for (int e = 0; e < P; ++e) {
      k[e] = load(kt + e * length + j), v[e] = load(vt + e * length + j);
      dk[e] = load(dkt + e * length + j), dv[e] = load(dvt + e * length + j);
    }
    WordVec<T> golden;
    if constexpr (Drop) golden = golden_lanes<T>(j);
    for (int64_t r = 0; r < n; ++r) {
      const Row& row = rows[r];
      Vec<T> p = weight(row, k), dp = weight_gradient(row, v);
      if constexpr (Masked) p = visible(row, j) ? p : zero;
      Vec<T> shown = p;
      if constexpr (Drop) {
        const IntVec<T> keep = is_kept(row, golden);
        shown = keep ? p : zero;
        dp = keep ? dp : zero;
      }
      Vec<T> d = dp - row.delta;
      if constexpr (Sparse) d = p > zero ? d : zero;
      else d *= p;
      for (int e = 0; e < P; ++e) dv[e] += shown * row.g[e];
      for (int e = 0; e < P; ++e) dk[e] += d * row.q[e];
      store(ds + r * length + j, d);
    }
    for (int e = 0; e < P; ++e) store(dkt + e * length + j, dk[e]), store(dvt + e * length + j, dv[e]);
  }

  MK_INLINE void block(int64_t i, int64_t n) {
    for (int64_t r = 0; r < n; ++r) {
      Row& row = rows[r];
      row.q = q + (i + r) * P, row.g = g + (i + r) * P;
      row.shift = it.stat[i + r] * score_factor<T>(Sparse);
      row.allowed = it.allowed(i + r);
      if constexpr (Drop) row.key = row_key(it.dropout.key, i + r);
      if constexpr (Sparse) {
        row.delta = support_mean(row);
      } else {
        T delta = 0;
        for (int64_t e = 0; e < it.Ev; ++e) delta += row.g[e] * it.out[(i + r) * it.Ev + e];
        row.delta = Drop ? delta / static_cast<T>(it.dropout.inverse) : delta;
      }
    }
    const int64_t full = rows[0].allowed / L * L, all = rows[n - 1].allowed;
    int64_t j = 0;
    for (; j < full; j += L) key_vector<false>(j, n);
    for (; j < all; j += L) key_vector<true>(j, n);
    int64_t r = 0;
    for (; r + 4 <= n; r += 4) query_gradients<T, P, 4>(all, ds + r * length, kt, length, it.E, it.scale, it.dq + (i + r) * it.E);
    for (; r < n; ++r) query_gradients<T, P, 1>(all, ds + r * length, kt, length, it.E, it.scale, it.dq + (i + r) * it.E);
  }
};

template <class T>
MK_INLINE void unpack_columns(const T* columns, int64_t n, int64_t total, int64_t features, int64_t length, T factor, T* out) {
  for (int64_t j = 0; j < n; ++j)
    for (int64_t e = 0; e < features; ++e) out[j * features + e] = columns[e * length + j] * factor;
  set(out + n * features, (total - n) * features, T(0));
}

template <class T, int P, bool Sparse, bool Drop>
MK_NOINLINE void small_backward(const Item<T>& it, Scratch<T>& scratch) {
  const int64_t first = it.first_query(), reached = it.reached(), length = round_up(reached, kLanes<T>);
  set(it.dq, first * it.E, T(0));
  set(it.dq + it.queries * it.E, (it.Tq - it.queries) * it.E, T(0));
  Backward<T, P, Sparse, Drop> run{it, length, scratch.take(it.queries * P), scratch.take(it.queries * P),
                                   scratch.take(length * P), scratch.take(length * P), scratch.take(length * P),
                                   scratch.take(length * P), scratch.take(length * kRows), {}};
  const T inverse = static_cast<T>(Drop ? it.dropout.inverse : 1.0);
  pack_rows(it.query, 0, it.queries, it.E, P, it.scale * score_factor<T>(Sparse), run.q);
  pack_rows(it.grad_out, 0, it.queries, it.Ev, P, inverse, run.g);
  for (T* zeroed : {run.kt, run.vt, run.dkt, run.dvt}) set(zeroed, length * P, T(0));
  pack_columns(it.key, 0, reached, it.E, length, T(1), run.kt);
  pack_columns(it.value, 0, reached, it.Ev, length, T(1), run.vt);
  for (int64_t i = first; i < it.queries; i += kRows) run.block(i, std::min(kRows, it.queries - i));
  unpack_columns(run.dkt, reached, it.Tk, it.E, length, Sparse ? T(1) : static_cast<T>(kLn2), it.dk);
  unpack_columns(run.dvt, reached, it.Tk, it.Ev, length, T(1), it.dv);
}

template <class T, int P>
MK_INLINE void small(const Item<T>& it, bool backward, Scratch<T>& scratch) {
  const bool drop = it.dropout.on;
  if (backward) {
    if (it.sparse) drop ? small_backward<T, P, true, true>(it, scratch) : small_backward<T, P, true, false>(it, scratch);
    else drop ? small_backward<T, P, false, true>(it, scratch) : small_backward<T, P, false, false>(it, scratch);
  } else {
    if (it.sparse) drop ? small_forward<T, P, true, true>(it, scratch) : small_forward<T, P, true, false>(it, scratch);
    else drop ? small_forward<T, P, false, true>(it, scratch) : small_forward<T, P, false, false>(it, scratch);
  }
}
}  // namespace body
}  // namespace MK_ISA
}  // namespace mk::cross_attention
