// Gradients of the dot critic's statistics. Scores are recomputed, and one block writes each output, once.
//
//   dS_ij = [allowed] (g_row_i exp(S_ij - row_lse_i) + g_col_j exp(S_ij - col_lse_j) + g_soft_i softplus'(S_ij))
//           + g_pos_i [j is the positive of i]
//   dx = scale dS y, dy = scale dS^T x, da = row sums, db = column sums, dscale = sum dS <x, y>
//
// A block owns BM rows of one side (x or y) and BO bytes of their features. It walks over the other side BN rows at a
// time, computes a tile of scores, turns it into dS in shared memory and adds dS times the other side's rows to
// registers. This takes 2 N = 4 G B N D FLOPs per side while the features fit BO bytes; with more features (`wide`),
// every feature block recomputes the scores. Both sides run in one launch without atomics, so every run gives the same
// bits. Nothing but the outputs is written to global memory.
#pragma once

#include "pairs.cuh"

namespace mk::dot_critic {

struct Side {  // one side of the problem: x (rows of S) or y (columns of S)
  const void* data;
  const float *bias, *lse, *g;
  const int64_t* ids;
  float *out, *out_bias;
  int n;
};

struct GradientArguments {
  Side x, y;
  const float *scale, *gain, *g_soft, *g_pos;
  float* scale_rows;
  int G, D, pairs, shift, x_tiles, y_tiles, feature_blocks;  // x_tiles, y_tiles: 0 if the side is not requested
  bool soft_signed, aligned;
};

template <int BM_, int BN_, int BO_, bool wide_>
struct Shape {
  static constexpr int BM = BM_, BN = BN_, BO = BO_;  // owned rows, rows of the other side, bytes of owned features
  static constexpr bool wide = wide_;
  static constexpr int panels = BO / kPanel;
  static constexpr int own_bytes = wide ? 2 * (BM + BN) * kPanel : panels * BM * kPanel;  // wide: a two-stage ring
  static constexpr int other_bytes = (wide ? 1 : 2) * panels * BN * kPanel;
  static constexpr int vectors = BM * (8 + 5 * 4) + 2 * BM * 2 * 4;
  static constexpr int shared = own_bytes + other_bytes + BM * kPanel + vectors;
  static constexpr int warp_rows = BM / 64, warp_columns = kWarps / warp_rows;  // how warps share the output
};

// Per-row values of the owned rows in shared memory, and the space in which their sums are gathered.
template <int BM>
struct OwnRows {
  int64_t* id;
  float *bias, *lse, *g, *soft, *pos, *sums;
  __device__ explicit OwnRows(unsigned char* memory) {
    id = reinterpret_cast<int64_t*>(memory);
    bias = reinterpret_cast<float*>(id + BM);
    lse = bias + BM, g = lse + BM, soft = g + BM, pos = soft + BM, sums = pos + BM;
  }
};

// A log-sum-exp over no pairs (-inf) becomes +inf, so that exp(S - lse) is 0 and never NaN.
__device__ __forceinline__ float usable(float lse) { return lse == -MK_INFINITY ? MK_INFINITY : lse; }

// dS of one pair. Terms whose weight is absent are not computed.
struct PairGradient {
  bool own_weight, other_weight, soft_weight, soft_signed;
  __device__ __forceinline__ float operator()(float s, bool taken, bool positive, float own_lse, float own_g,
                                              float other_lse, float other_g, float soft_g, float pos_g) const {
    float d = 0.0f;
    if (own_weight) d += own_g * fast_exp(s - own_lse);
    if (other_weight) d += other_g * fast_exp(s - other_lse);
    if (soft_weight) {
      const bool flip = soft_signed && positive;
      const float slope = sigmoid(flip ? -s : s);
      d += soft_g * (flip ? -slope : slope);
    }
    d = taken ? d : 0.0f;
    return positive ? d + pos_g : d;
  }
};

template <class P, class S>
__global__ void __launch_bounds__(kThreads) gradient_kernel(const GradientArguments a) {
  using E = typename P::Element;
  constexpr int BM = S::BM, BN = S::BN, m = BM / 64, n = BN / 16, owned = S::BO / static_cast<int>(sizeof(E));
  constexpr int out_n = owned / S::warp_columns / 8, per_panel = kPerPanel<P>;
  static_assert(n % 2 == 0 && BN * static_cast<int>(sizeof(E)) <= kPanel);
  unsigned char* own_memory = shared_memory<unsigned char, S::shared>();
  unsigned char* other_memory = own_memory + S::own_bytes;
  unsigned char* ds_memory = other_memory + S::other_bytes;
  const OwnRows<BM> rows(ds_memory + BM * kPanel);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
  const int tiles = a.x_tiles + a.y_tiles;
  int at = blockIdx.x;
  const int tile = at % tiles;
  at /= tiles;
  const int feature_block = at % a.feature_blocks, group = at / a.feature_blocks;
  const bool swap = tile >= a.x_tiles;  // the block owns columns of S (rows of y)
  const Side own = swap ? a.y : a.x, other = swap ? a.x : a.y;
  const int row = (swap ? tile - a.x_tiles : tile) * BM, feature = feature_block * owned;
  const E* own_data = static_cast<const E*>(own.data) + static_cast<int64_t>(group) * own.n * a.D;
  const E* other_data = static_cast<const E*>(other.data) + static_cast<int64_t>(group) * other.n * a.D;
  const int64_t own_offset = static_cast<int64_t>(group) * own.n, other_offset = static_cast<int64_t>(group) * other.n;
  const float scale = a.scale[group], gain = a.gain ? a.gain[0] : 1.0f, shrink = 1.0f / gain;
  const int panels = (a.D + per_panel - 1) / per_panel, columns_of_s = a.y.n;
  const bool positives = a.shift >= 0 && (a.g_pos || a.soft_signed || a.pairs == kUnequalIdsOrPositive);
  const PairGradient pair_gradient{own.g != nullptr, other.g != nullptr, a.g_soft != nullptr, a.soft_signed};
  const bool ids = a.pairs >= kUnequalIds;

  if (threadIdx.x < BM) {
    const int i = row + threadIdx.x;
    const bool inside = i < own.n;
    rows.id[threadIdx.x] = element<int64_t>(ids ? own.ids : nullptr, own_offset + i, inside, 0);
    rows.bias[threadIdx.x] = element(own.bias, own_offset + i, inside, 0.0f);
    rows.lse[threadIdx.x] = usable(element(own.lse, own_offset + i, inside, MK_INFINITY));
    rows.g[threadIdx.x] = element(own.g, own_offset + i, inside, 0.0f);
    rows.soft[threadIdx.x] = element(swap ? nullptr : a.g_soft, own_offset + i, inside, 0.0f);
    rows.pos[threadIdx.x] = element(swap ? nullptr : a.g_pos, own_offset + i, inside, 0.0f);
  }

  auto load_other = [&](unsigned char* to, int first_row, int panel, int first_feature) {
    load_panel<P, BN, kThreads>(to + panel * BN * kPanel, other_data, first_row, other.n,
                                first_feature + panel * per_panel, a.D, a.aligned);
  };
  const int resident = min(S::panels, panels);
  if constexpr (!S::wide) {
    for (int k = 0; k < resident; ++k) {
      load_panel<P, BM, kThreads>(own_memory + k * BM * kPanel, own_data, row, own.n, k * per_panel, a.D, a.aligned);
      load_other(other_memory, 0, k, 0);
    }
    copy_async_commit();
  }

  float out[4][out_n][4];
  clear(out);
  float sums[2 * m], dots[2 * m];
#pragma unroll
  for (int r = 0; r < 2 * m; ++r) sums[r] = dots[r] = 0.0f;
  const int warp_row = warp / 2 * (16 * m), warp_column = warp % 2 * (8 * n);
  const int out_row = warp / S::warp_columns * 64, out_column = warp % S::warp_columns * (8 * out_n);
  const int other_tiles = (other.n + BN - 1) / BN;

  for (int step = 0; step < other_tiles; ++step) {
    unsigned char* other_tile = other_memory + (S::wide ? 0 : step % 2 * S::panels * BN * kPanel);
    float c[m][n][4];
    clear(c);
    if constexpr (S::wide) {
      __syncthreads();  // the previous step's products no longer read other_tile
      auto stream = [&](int k) {
        unsigned char* to = own_memory + k % 2 * (BM + BN) * kPanel;
        load_panel<P, BM, kThreads>(to, own_data, row, own.n, k * per_panel, a.D, a.aligned);
        load_panel<P, BN, kThreads>(to + BM * kPanel, other_data, step * BN, other.n, k * per_panel, a.D, a.aligned);
        if (k < S::panels) load_other(other_tile, step * BN, k, feature);
        copy_async_commit();
      };
      stream(0);
      for (int k = 0; k < panels; ++k) {
        copy_async_wait<0>();
        __syncthreads();
        if (k + 1 < panels) stream(k + 1);
        const unsigned char* from = own_memory + k % 2 * (BM + BN) * kPanel;
        multiply_panel<P>(c, from, warp_row, from + BM * kPanel, warp_column, lane);
      }
    } else {
      copy_async_wait<0>();
      __syncthreads();  // this tile has arrived, and the previous step's products no longer read the other tile or dS
      if (step + 1 < other_tiles) {
        unsigned char* next = other_memory + (step + 1) % 2 * S::panels * BN * kPanel;
        for (int k = 0; k < resident; ++k) load_other(next, (step + 1) * BN, k, 0);
      }
      copy_async_commit();
      for (int k = 0; k < resident; ++k)
        multiply_panel<P>(c, own_memory + k * BM * kPanel, warp_row, other_tile + k * BN * kPanel, warp_column, lane);
    }

#pragma unroll
    for (int j = 0; j < n; ++j) {
      float bias[2], lse[2], g[2], soft[2], pos[2];
      int64_t id[2];
      int positive_of[2];
      const int column = step * BN + warp_column + 8 * j + 2 * t;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int k = column + e;
        const bool inside = k < other.n;
        bias[e] = element(other.bias, other_offset + k, inside, 0.0f);
        lse[e] = usable(element(other.lse, other_offset + k, inside, MK_INFINITY));
        g[e] = element(other.g, other_offset + k, inside, 0.0f);
        soft[e] = element(swap ? a.g_soft : nullptr, other_offset + k, inside, 0.0f);
        pos[e] = element(swap ? a.g_pos : nullptr, other_offset + k, inside, 0.0f);
        id[e] = element<int64_t>(ids ? other.ids : nullptr, other_offset + k, inside, 0);
        positive_of[e] = positives && swap ? static_cast<int>((static_cast<int64_t>(k) + a.shift) % columns_of_s) : -1;
      }
#pragma unroll
      for (int r = 0; r < 2 * m; ++r) {
        const int i = warp_row + lane / 4 + 8 * r;
        const int positive_column =
            positives && !swap ? static_cast<int>((static_cast<int64_t>(row + i) + a.shift) % columns_of_s) : -1;
        float d[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int k = column + e;
          const float dot = c[r / 2][j][r % 2 * 2 + e];
          const bool inside = (row + i < own.n) & (k < other.n);
          const bool positive = inside & positives & (swap ? positive_of[e] == row + i : positive_column == k);
          const bool taken = inside & allowed(a.pairs, row + i, k, rows.id[i], id[e], positive);
          const float s = dot * scale + rows.bias[i] + bias[e];
          d[e] = pair_gradient(s, taken, positive, rows.lse[i], rows.g[i], lse[e], g[e], swap ? soft[e] : rows.soft[i],
                               swap ? pos[e] : rows.pos[i]);
          sums[r] += d[e];
          dots[r] += d[e] * dot;
        }
        store_left<P>(ds_memory, i, warp_column + 8 * j, t, d[0] * shrink, d[1] * shrink);
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < BN * static_cast<int>(sizeof(E)) / 32; ++k) {
      uint32_t left[4][4], right[out_n][2];
      load_left(left, ds_memory, out_row, k, lane);
      load_right_down<P>(right, other_tile, BN, out_column, k, lane);
      multiply<P>(out, left, right);
    }
  }

  float* to = own.out + static_cast<int64_t>(group) * own.n * a.D;
  const float factor = scale * gain;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + out_row + 16 * i + 8 * h + lane / 4;
#pragma unroll
      for (int j = 0; j < out_n; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int f = feature + out_column + 8 * j + 2 * t + e;
          if (own.out && r < own.n && f < a.D) to[static_cast<int64_t>(r) * a.D + f] = out[i][j][2 * h + e] * factor;
        }
    }
  if (feature_block) return;
#pragma unroll
  for (int r = 0; r < 2 * m; ++r) {
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
      sums[r] += __shfl_xor_sync(0xffffffff, sums[r], mask);
      dots[r] += __shfl_xor_sync(0xffffffff, dots[r], mask);
    }
    float* gathered = rows.sums + 2 * (warp % 2 * BM + warp_row + lane / 4 + 8 * r);
    if (t == 0) gathered[0] = sums[r], gathered[1] = dots[r];
  }
  __syncthreads();
  const int i = threadIdx.x;
  if (i < BM && row + i < own.n) {
    const float *p = rows.sums + 2 * i, *q = rows.sums + 2 * (BM + i);
    if (own.out_bias) own.out_bias[own_offset + row + i] = p[0] + q[0];
    if (!swap && a.scale_rows) a.scale_rows[own_offset + row + i] = p[1] + q[1];
  }
}

}  // namespace mk::dot_critic
