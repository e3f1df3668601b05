// Attention backward for small heads (see rows.cuh). Weights are recomputed from the saved statistics.
//
//   dp_ij = m_ij <g_i, v_j>, ds_ij = p_ij (dp_ij - delta_i), delta_i = <g_i, out_i>
//   sparsemax: ds_ij = [p_ij > 0] (dp_ij - delta_i), delta_i = the mean of dp_ij over the support
//   dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i m_ij p_ij g_i
//
// The owner of a row computes its gradient, so there are no atomics. query_kernel takes 3 D multiplications per query
// and key (2 D more for sparsemax's mean); key_kernel takes 4 D, and its tiles also hold the queries' statistics,
// deltas and hash keys.
#pragma once

#include "rows.cuh"

namespace mk::cross_attention {

template <bool sparse>
__device__ __forceinline__ float dscore(float weight, float dp, float delta) {
  return sparse ? (weight > 0.0f ? dp - delta : 0.0f) : weight * (dp - delta);
}

template <int D, bool sparse, bool drops>
__global__ void __launch_bounds__(kThreads, 2) query_kernel(const __grid_constant__ Call call) {
  constexpr int R = kRowsPerLane<D>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, work = blockIdx.x * kWarps + warp;
  if (work >= call.work) return;
  float* tile = shared_memory<float, kShared<D>>() + warp * kTile * kStride<D>;
  const Head at = head_of(call, work, kOwned<D>, [](const Pair& p) { return p.n_q; });
  const Pair& p = *at.pair;
  const Rows queries = rows_of(p.query, at, at.end_q, call.E, call.type);
  const Rows grads = rows_of(p.grad, at, at.end_q, call.EV, call.type);
  const Rows keys = rows_of(p.key, at, at.end_k, call.E, call.type);
  const Rows values = rows_of(p.value, at, at.end_k, call.EV, call.type);
  const int64_t first_row = static_cast<int64_t>(at.item) * p.n_q;
  const Rows outs{p.out, first_row * call.EV, call.EV, at.end_q, call.EV, call.type};
  const int end = keys_end(at, kOwned<D>);

  float q[R][D], g[R][D], dq[R][D], stat[R], delta[R], count[R];
  RowKeys hash[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int i = at.row + 32 * r + lane;
    load_row(dq[r], outs, i);
    load_row(q[r], queries, i);
    load_row(g[r], grads, i);
    delta[r] = sparse ? 0.0f : dot(g[r], dq[r]);
    stat[r] = i < at.end_q ? p.stat[first_row + i] * kUnit<sparse> : MK_INFINITY;
    count[r] = 0.0f;
    clear(dq[r]);
#pragma unroll
    for (int e = 0; e < D; ++e) q[r][e] *= p.scale * kUnit<sparse>;
    if (drops) hash[r] = row_keys(head_key(p, at.item), i);
  }
  // Calls f(r, weight, dp, k) for every owned row r and every key that it may attend to.
  auto products = [&](auto f) {
    walk<D, true>(keys, 1.0f, values, 0, end, tile, NoExtra(), [&](int key) {
      const bool masked = key + kTile > at.end_k || key + kTile - 1 > at.row + p.offset;
#pragma unroll kStep<D>
      for (int u = 0; u < kTile; ++u) {
        float k[D], v[D];
        get_row(k, tile + u * kStride<D>);
        get_row(v, tile + u * kStride<D> + D);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int j = key + u;
          float a = weight<sparse>(dot(q[r], k), stat[r]), dp = dot(g[r], v);
          if (masked && (j >= at.end_k || j - (at.row + 32 * r + lane) > p.offset)) a = 0.0f;
          if (drops) dp = kept(hash[r], j, p.drop_below) ? dp * p.keep : 0.0f;
          f(r, a, dp, k);
        }
      }
    });
  };
  if constexpr (sparse) {
    products([&](int r, float a, float dp, const float (&)[D]) {
      if (a > 0.0f) delta[r] += dp, count[r] += 1.0f;
    });
#pragma unroll
    for (int r = 0; r < R; ++r) delta[r] /= fmaxf(count[r], 1.0f);
  }
  products([&](int r, float a, float dp, const float (&k)[D]) { add(dq[r], dscore<sparse>(a, dp, delta[r]), k); });
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int i = at.row + 32 * r + lane;
    if (i >= p.n_q) continue;
    store_row(p.dquery, (first_row + i) * call.E, dq[r], p.scale, call.E, call.type);
    p.delta[first_row + i] = delta[r];
  }
}

template <int D, bool sparse, bool drops>
__global__ void __launch_bounds__(kThreads, 2) key_kernel(const __grid_constant__ Call call) {
  constexpr int R = kRowsPerLane<D>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, work = blockIdx.x * kWarps + warp;
  if (work >= call.work) return;
  float* tile = shared_memory<float, kShared<D>>() + warp * kTile * kStride<D>;
  const Head at = head_of(call, work, kOwned<D>, [](const Pair& p) { return p.n_k; });
  const Pair& p = *at.pair;
  const Rows queries = rows_of(p.query, at, at.end_q, call.E, call.type);
  const Rows grads = rows_of(p.grad, at, at.end_q, call.EV, call.type);
  const Rows keys = rows_of(p.key, at, at.end_k, call.E, call.type);
  const Rows values = rows_of(p.value, at, at.end_k, call.EV, call.type);
  const int64_t first_row = static_cast<int64_t>(at.item) * p.n_q;
  // The range of queries that may attend to any of the owned keys.
  const int first = max(at.row - p.offset, 0) / kTile * kTile, end = at.row < at.end_k ? at.end_q : 0;
  const uint32_t head = drops ? head_key(p, at.item) : 0;

  float k[R][D], v[R][D], dk[R][D], dv[R][D];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    load_row(k[r], keys, at.row + 32 * r + lane);
    load_row(v[r], values, at.row + 32 * r + lane);
    clear(dk[r]);
    clear(dv[r]);
  }
  auto extra = [&](int i, float* to) {
    const bool inside = i < at.end_q;
    const RowKeys hash = drops ? row_keys(head, i) : RowKeys{0, 0};
    *reinterpret_cast<float4*>(to) =
        make_float4(inside ? p.stat[first_row + i] * kUnit<sparse> : MK_INFINITY, inside ? p.delta[first_row + i] : 0.0f,
                    __uint_as_float(hash.first), __uint_as_float(hash.second));
  };
  walk<D, true>(queries, p.scale * kUnit<sparse>, grads, first, end, tile, extra, [&](int query) {
    const bool masked = at.row + kOwned<D> > at.end_k || at.row + kOwned<D> - 1 - query > p.offset;
#pragma unroll kStep<D>
    for (int u = 0; u < kTile; ++u) {
      float q[D], g[D];
      get_row(q, tile + u * kStride<D>);
      get_row(g, tile + u * kStride<D> + D);
      const float4 row = *reinterpret_cast<const float4*>(tile + u * kStride<D> + 2 * D);  // stat, delta, hash keys
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int j = at.row + 32 * r + lane;
        float a = weight<sparse>(dot(k[r], q), row.x), dp = dot(v[r], g);
        if (masked && (j >= at.end_k || j - (query + u) > p.offset)) a = 0.0f;
        float factor = 1.0f;
        if (drops) {
          const RowKeys hash{__float_as_uint(row.z), __float_as_uint(row.w)};
          factor = kept(hash, j, p.drop_below) ? p.keep : 0.0f;
        }
        add(dv[r], a * factor, g);
        add(dk[r], dscore<sparse>(a, dp * factor, row.y), q);
      }
    }
  });
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int j = at.row + 32 * r + lane;
    if (j >= p.n_k) continue;
    const int64_t row = static_cast<int64_t>(at.item) * p.n_k + j;
    store_row(p.dkey, row * call.E, dk[r], 1.0f / kUnit<sparse>, call.E, call.type);
    store_row(p.dvalue, row * call.EV, dv[r], 1.0f, call.EV, call.type);
  }
}

}  // namespace mk::cross_attention
