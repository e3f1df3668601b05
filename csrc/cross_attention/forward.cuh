// Attention forward for small heads: each lane owns queries, and the warp walks over the keys (see rows.cuh).
//
//   softmax:   online log-sum-exp in one pass; per query and key 2 D multiplications, an exponential and four more
//   sparsemax: finds tau, then computes the output in one pass. The first pass bounds tau from below: any set A of keys
//              has (sum_A s - 1) / |A| <= tau, and A collects, in order, the scores above the bound so far (Condat
//              2016). Newton's steps on all keys follow, tau <- tau + (sum max(s - tau, 0) - 1) / #{s > tau}, until no
//              score of a row lies between tau and the new tau: then the support was right and the step is exact. Every
//              other step removes at least one key from the support.
#pragma once

#include "rows.cuh"

namespace mk::cross_attention {

// Scores of the tile's kUnroll keys that start at `u`; -inf where the query may not attend to the key.
template <int D, int R, bool masked>
__device__ __forceinline__ void scores(float (&s)[R][kUnroll], const float (&q)[R][D], const float* tile, int u, int key,
                                       int end_k, const int (&last)[R]) {
#pragma unroll
  for (int c = 0; c < kUnroll; ++c) {
    float k[D];
    get_row(k, tile + (u + c) * kStride<D>);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      s[r][c] = dot(q[r], k);
      if (masked && (key + c >= end_k || key + c > last[r])) s[r][c] = -MK_INFINITY;
    }
  }
}

template <int R>
struct Thresholds {
  float tau[R], highest[R];

  // The first pass: sum and count of A. Scores are summed relative to `base`, so that few digits cancel.
  float base[R], sum[R], count[R];
  __device__ __forceinline__ void start() {
#pragma unroll
    for (int r = 0; r < R; ++r) tau[r] = highest[r] = -MK_INFINITY, base[r] = sum[r] = count[r] = 0.0f;
  }
  __device__ __forceinline__ void gather(const float (&s)[R][kUnroll]) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float top = s[r][0];
#pragma unroll
      for (int c = 1; c < kUnroll; ++c) top = fmaxf(top, s[r][c]);
      highest[r] = fmaxf(highest[r], top);
      if (!(top > tau[r])) continue;
      if (top - 1.0f > tau[r]) tau[r] = base[r] = top - 1.0f, sum[r] = count[r] = 0.0f;
#pragma unroll
      for (int c = 0; c < kUnroll; ++c)
        if (s[r][c] > tau[r]) sum[r] += s[r][c] - base[r], count[r] += 1.0f;
      if (count[r] > 0.0f) tau[r] = fmaxf(tau[r], base[r] + (sum[r] - 1.0f) / count[r]);
    }
  }
  __device__ __forceinline__ void below() {  // lowers the bound a little, in case rounding carried it past tau
#pragma unroll
    for (int r = 0; r < R; ++r) tau[r] = below_top(r, tau[r] - 1e-6f * (fabsf(tau[r]) + 1.0f));
  }
  // If scores are so large that tau would be rounded up to the highest score, returns the next smaller number instead,
  // so that the support does not become empty.
  __device__ __forceinline__ float below_top(int r, float at) const {
    return at >= highest[r] && highest[r] > -MK_INFINITY ? nextafterf(highest[r], -MK_INFINITY) : at;
  }

  // One Newton step on all keys.
  float least[R];
  __device__ __forceinline__ void start_step() {
#pragma unroll
    for (int r = 0; r < R; ++r) sum[r] = count[r] = 0.0f, least[r] = MK_INFINITY;
  }
  __device__ __forceinline__ void gather_step(const float (&s)[R][kUnroll]) {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int c = 0; c < kUnroll; ++c)
        if (s[r][c] > tau[r]) sum[r] += s[r][c] - tau[r], count[r] += 1.0f, least[r] = fminf(least[r], s[r][c]);
  }
  __device__ __forceinline__ bool step() {  // returns whether any row needs another step
    bool unsettled = false;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (count[r] > 0.0f) tau[r] = below_top(r, tau[r] + (sum[r] - 1.0f) / count[r]);
      unsettled |= tau[r] >= least[r];
    }
    return unsettled;
  }
};

template <int D, bool sparse, bool drops>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const __grid_constant__ Call call) {
  constexpr int R = kRowsPerLane<D>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, work = blockIdx.x * kWarps + warp;
  if (work >= call.work) return;
  float* tile = shared_memory<float, kShared<D>>() + warp * kTile * kStride<D>;
  const Head at = head_of(call, work, kOwned<D>, [](const Pair& p) { return p.n_q; });
  const Pair& p = *at.pair;
  const Rows queries = rows_of(p.query, at, at.end_q, call.E, call.type);
  const Rows keys = rows_of(p.key, at, at.end_k, call.E, call.type);
  const Rows values = rows_of(p.value, at, at.end_k, call.EV, call.type);
  const int end = keys_end(at, kOwned<D>);

  float q[R][D], out[R][D], top[R], sum[R];
  int last[R];  // the last key that the causal mask allows
  RowKeys hash[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int i = at.row + 32 * r + lane;
    load_row(q[r], queries, i);
#pragma unroll
    for (int e = 0; e < D; ++e) q[r][e] *= p.scale * kUnit<sparse>;
    clear(out[r]);
    top[r] = -MK_INFINITY, sum[r] = 0.0f, last[r] = i + p.offset;
    if (drops) hash[r] = row_keys(head_key(p, at.item), i);
  }
  // Calls f(s, u, key) for each block of kUnroll keys of a tile.
  auto chunks = [&](int key, auto f) {
    const bool masked = key + kTile > at.end_k || key + kTile - 1 > at.row + p.offset;
    for (int u = 0; u < kTile; u += kUnroll) {
      float s[R][kUnroll];
      if (masked) scores<D, R, true>(s, q, tile, u, key + u, at.end_k, last);
      else scores<D, R, false>(s, q, tile, u, key + u, at.end_k, last);
      f(s, u, key + u);
    }
  };
  Thresholds<R> threshold;
  if constexpr (sparse) {
    threshold.start();
    walk<D, false>(keys, 1.0f, keys, 0, end, tile, NoExtra(), [&](int key) {
      chunks(key, [&](const float (&s)[R][kUnroll], int, int) { threshold.gather(s); });
    });
    threshold.below();
    bool unsettled = end > 0;
    while (__any_sync(0xffffffff, unsettled)) {
      threshold.start_step();
      walk<D, false>(keys, 1.0f, keys, 0, end, tile, NoExtra(), [&](int key) {
        chunks(key, [&](const float (&s)[R][kUnroll], int, int) { threshold.gather_step(s); });
      });
      unsettled = threshold.step();
    }
  }
  walk<D, true>(keys, 1.0f, values, 0, end, tile, NoExtra(), [&](int key) {
    chunks(key, [&](float (&s)[R][kUnroll], int u, int j) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        float reference;
        if constexpr (sparse) {
          reference = top[r] = threshold.tau[r];
        } else {
          float highest = top[r];
#pragma unroll
          for (int c = 0; c < kUnroll; ++c) highest = fmaxf(highest, s[r][c]);
          if (highest > top[r]) {
            const float shrink = fast_exp2(top[r] - highest);
            sum[r] *= shrink, top[r] = highest;
#pragma unroll
            for (int e = 0; e < D; ++e) out[r][e] *= shrink;
          }
          reference = finite_reference(top[r]);
        }
#pragma unroll
        for (int c = 0; c < kUnroll; ++c) {
          s[r][c] = weight<sparse>(s[r][c], reference);
          sum[r] += s[r][c];
          if (drops && !kept(hash[r], j + c, p.drop_below)) s[r][c] = 0.0f;
        }
      }
#pragma unroll
      for (int c = 0; c < kUnroll; ++c) {
        float v[D];
        get_row(v, tile + (u + c) * kStride<D> + D);
#pragma unroll
        for (int r = 0; r < R; ++r) add(out[r], s[r][c], v);
      }
    });
  });
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int i = at.row + 32 * r + lane;
    if (i >= p.n_q) continue;
    const int64_t row = static_cast<int64_t>(at.item) * p.n_q + i;
    const bool seen = i < at.end_q && min(at.end_k, last[r] + 1) > 0;  // attends to some key (its score may be NaN)
    const bool alive = seen && top[r] > -MK_INFINITY;
    float factor = drops ? p.keep : 1.0f;
    if (alive && !(sum[r] <= 0.0f)) factor /= sum[r];  // sparsemax's sum is 1 up to rounding
    if (!seen) clear(out[r]);
    store_row(p.out, row * call.EV, out[r], factor, call.EV, call.type);
    p.stat[row] = !alive ? MK_INFINITY : sparse ? top[r] : (top[r] + log2f(sum[r])) * (1.0f / kLog2e);
  }
}

}  // namespace mk::cross_attention
