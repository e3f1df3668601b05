// Gradients of the MLP critic's layers from g[p] = dL / d(score p) and the bits m[p, k] of the second layer:
//
//   dh1 = g (m (diag(w) W2))      du_i = sum_j dh1 act'(u_i + v_j)      dv_j = sum_i of the same
//   P = m^T (g h1)                s = m^T g
//
// The caller computes dW2 = diag(w) P, db2 = w s and dw = rowsum(W2 * P) + b2 s. With a leaky ReLU, m is 1 or its
// slope. input_kernel: a block owns rows and 128 features; it walks over columns and accumulates du in registers and dv
// in its own slice [N, H1] of the output (one slice per row block). product_kernel: a block owns 128 x 128 entries of P
// and a range of pairs. There are no atomics. Each kernel takes M = 2 G B N H1 H2 FLOPs; the bits, 1/8 byte per unit
// and pair, are read H1 / 128 times.
#pragma once

#include "pairs.cuh"

namespace mk::mlp_critic {

constexpr int kInputShared = 2 * kPanelBytes + 3 * kUnits * kPanel + kRows * kUnits * 4 + 4 * kColumns * kUnits * 4;

static __global__ void __launch_bounds__(kThreads) score_gradient_kernel(const Critic c, const ScoreGradients a) {
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, per_group = static_cast<int64_t>(c.B) * c.N;
  if (pair >= c.G * per_group) return;
  const int group = static_cast<int>(pair / per_group), i = static_cast<int>(pair % per_group / c.N), j = static_cast<int>(pair % c.N);
  const int64_t row = static_cast<int64_t>(group) * c.B + i, column = static_cast<int64_t>(group) * c.N + j;
  const float raw = a.scores[pair], s = c.softplus ? softplus(raw) : raw;
  const bool diagonal = i + c.first_row == j;
  float g = 0.0f;
  if (!(c.off_diagonal && diagonal)) {
    if (a.g_sum) g += a.g_sum[row];
    if (a.g_row) g += a.g_row[row] * fast_exp(s - a.row_lse[row]);
    if (a.g_col) g += a.g_col[column] * fast_exp(s - a.col_lse[column]);
    if (a.g_soft) g += a.g_soft[row] * sigmoid(s);
  }
  if (a.g_positive && diagonal) g += a.g_positive[row];
  a.g[pair] = c.softplus ? g * sigmoid(raw) : g;
}

// Derivatives of the second layer's activation from its bits: a row per pair, a column per unit, [kPairs, one panel].
template <class P>
__device__ __forceinline__ void expand_bits(unsigned char* panel, const uint32_t* bits, const Critic& c, int row, int column,
                                            int first) {
  const int n_words = ceil_div(c.H2, 32);
#pragma unroll 2
  for (int n = threadIdx.x; n < kPairs * 8; n += kThreads) {
    const int pair = n / 8, chunk = n % 8, i = row + pair / kColumns, j = column + pair % kColumns;
    const int unit = first + unit_of<P>(chunk, 0), word = unit / 32;
    const bool inside = i < c.B && j < c.N && word < n_words;
    const uint32_t value = inside ? bits[(static_cast<int64_t>(i) * n_words + word) * c.N + j] : 0;
    Chunk<P> m;
#pragma unroll
    for (int e = 0; e < kPerChunk<P>; ++e)
      m.e[e] = from_float<typename P::Element>(value >> ((first + unit_of<P>(chunk, e)) % 32) & 1 ? 1.0f : c.slope);
    *reinterpret_cast<Chunk<P>*>(panel + panel_at(pair, chunk)) = m;
  }
}

template <class P>
__global__ void __launch_bounds__(kThreads) input_kernel(const Critic c, const LayerGradients a, const int row_tiles,
                                                         const bool aligned) {
  using E = typename P::Element;
  constexpr int depth = kPerPanel<P>, stage = kUnits * kPanel;  // depth: units of the second layer per step
  unsigned char* left = shared_memory<unsigned char, kInputShared>();
  unsigned char* ring = left + 2 * kPanelBytes;
  float* u_tile = reinterpret_cast<float*>(ring + 3 * stage);  // [kRows, kUnits]
  float* across = u_tile + kRows * kUnits;                     // [4, kColumns, kUnits]

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4, warp_row = warp / 2, base = warp % 2 * 64;
  const int feature_blocks = ceil_div(c.H1, kUnits);
  const int block = blockIdx.x % a.row_blocks, rest = blockIdx.x / a.row_blocks;
  const int feature = rest % feature_blocks * kUnits, group = rest / feature_blocks, of = c.own ? group : 0;
  const int64_t rows_before = static_cast<int64_t>(group) * c.B, columns_before = static_cast<int64_t>(group) * c.N;
  const float *u = c.u + rows_before * c.H1, *v = c.v + columns_before * c.H1;
  const E* folded = static_cast<const E*>(a.folded) + static_cast<int64_t>(of) * c.H2 * c.H1;
  const uint32_t* bits = a.bits + rows_before * ceil_div(c.H2, 32) * c.N;
  const float* g = a.g + rows_before * c.N;
  float* slice = a.dv + (static_cast<int64_t>(block) * c.G + group) * c.N * c.H1;
  const int steps = ceil_div(c.H2, depth), column_tiles = ceil_div(c.N, kColumns);
  auto stream = [&](int step) {
    if (step < steps)
      for (int q = 0; q < kUnits / depth; ++q)
        load_panel<P, depth, kThreads>(ring + step % 3 * stage + q * depth * kPanel, folded, step * depth, c.H2,
                                       feature + q * depth, c.H1, aligned);
    copy_async_commit();
  };

  for (int row_tile = block; row_tile < row_tiles; row_tile += a.row_blocks) {
    const int row = row_tile * kRows;
    for (int n = threadIdx.x; n < kRows * kUnits; n += kThreads) {
      const int i = row + n / kUnits, l = feature + n % kUnits;
      u_tile[n] = i < c.B && l < c.H1 ? u[static_cast<int64_t>(i) * c.H1 + l] : 0.0f;
    }
    float du[2][8][4];
    clear(du);
    for (int column_tile = 0; column_tile < column_tiles; ++column_tile) {
      const int column = column_tile * kColumns;
      float dh[2][8][4];
      clear(dh);
      stream(0);
      stream(1);
      for (int step = 0; step < steps; ++step) {
        expand_bits<P>(left + step % 2 * kPanelBytes, bits, c, row, column, step * depth);
        copy_async_wait<1>();
        __syncthreads();
        stream(step + 2);
#pragma unroll(kUnroll<P>)
        for (int k = 0; k < kSteps; ++k) {
          uint32_t l[2][4], r[8][2];
          load_left(l, left + step % 2 * kPanelBytes, warp_row * 32, k, lane);
          load_right_down<P>(r, ring + step % 3 * stage, depth, base, k, lane);
          multiply<P>(dh, l, r);
        }
      }
      const int j = column + lane / 4;
      float weight[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int i = row + warp_row * 4 + r;
        weight[r] = i < c.B && j < c.N ? g[static_cast<int64_t>(i) * c.N + j] : 0.0f;
      }
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int local = base + 8 * n + 2 * t + e, l = feature + local;
          const float right = j < c.N && l < c.H1 ? v[static_cast<int64_t>(j) * c.H1 + l] : 0.0f;
          float total = 0.0f;
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float z = u_tile[(warp_row * 4 + r) * kUnits + local] + right;
            const float d = dh[r / 2][n][r % 2 * 2 + e] * weight[r] * (z > 0.0f ? 1.0f : c.slope);
            du[r / 2][n][r % 2 * 2 + e] += d;
            total += d;
          }
          across[(warp_row * kColumns + lane / 4) * kUnits + local] = total;
        }
      __syncthreads();
#pragma unroll 2
      for (int n = threadIdx.x; n < kColumns * kUnits; n += kThreads) {
        const int k = column + n / kUnits, l = feature + n % kUnits;
        if (k >= c.N || l >= c.H1) continue;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < 4; ++w) total += across[w * kColumns * kUnits + n];
        float& to = slice[static_cast<int64_t>(k) * c.H1 + l];
        to = row_tile == block ? total : to + total;
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float total = du[r / 2][n][r % 2 * 2 + e];
#pragma unroll
          for (int mask = 4; mask < 32; mask *= 2) total += __shfl_xor_sync(0xffffffff, total, mask);
          const int i = row + warp_row * 4 + r, l = feature + base + 8 * n + 2 * t + e;
          if (lane < 4 && i < c.B && l < c.H1) a.du[(rows_before + i) * c.H1 + l] = total;
        }
  }
}

template <class P>
constexpr int kProductShared = 2 * kUnits * kPanel + kPerPanel<P> * (kUnits / 32) * 4 + kPerPanel<P> * 4;

template <class P>
__global__ void __launch_bounds__(kThreads) product_kernel(const Critic c, const LayerGradients a, const bool aligned) {
  using E = typename P::Element;
  constexpr int depth = kPerPanel<P>, n_words = kUnits / 32, per = kPerChunk<P>;  // depth: pairs per step
  unsigned char* left = shared_memory<unsigned char, kProductShared<P>>();       // m^T: [kUnits, depth]
  unsigned char* right = left + kUnits * kPanel;                                  // g h1: [depth, kUnits] in panels
  uint32_t* words = reinterpret_cast<uint32_t*>(right + kUnits * kPanel);         // [n_words, depth]
  float* weights = reinterpret_cast<float*>(words + n_words * depth);             // [depth]

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
  const int unit_blocks = ceil_div(c.H2, kUnits), feature_blocks = ceil_div(c.H1, kUnits);
  int at = blockIdx.x;
  const int feature = at % feature_blocks * kUnits;
  at /= feature_blocks;
  const int unit = at % unit_blocks * kUnits;
  at /= unit_blocks;
  const int split = at % a.splits, group = at / a.splits;
  const int64_t rows_before = static_cast<int64_t>(group) * c.B, pairs = static_cast<int64_t>(c.B) * c.N;
  const float *u = c.u + rows_before * c.H1, *v = c.v + static_cast<int64_t>(group) * c.N * c.H1;
  const int all_words = ceil_div(c.H2, 32);
  const uint32_t* bits = a.bits + rows_before * all_words * c.N;
  const float* g = a.g + rows_before * c.N;
  const float shrink = a.gain ? 1.0f / a.gain[0] : 1.0f;
  const int64_t steps = (pairs + depth - 1) / depth, begin = steps * split / a.splits, end = steps * (split + 1) / a.splits;

  float out[2][8][4], sums[kUnits * 8 / kThreads];
  clear(out);
#pragma unroll
  for (float& s : sums) s = 0.0f;
  for (int64_t step = begin; step < end; ++step) {
    const int64_t first = step * depth;
    for (int n = threadIdx.x; n < n_words * depth; n += kThreads) {
      const int64_t pair = first + n % depth;
      const int word = unit / 32 + n / depth;
      words[n] = pair < pairs && word < all_words ? bits[(pair / c.N * all_words + word) * c.N + pair % c.N] : 0;
      if (n < depth) weights[n] = pair < pairs ? g[pair] * shrink : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int q = 0; q < kUnits * 8 / kThreads; ++q) {
      const int n = threadIdx.x + q * kThreads, row = n / 8, chunk = n % 8;
      Chunk<P> m;
#pragma unroll
      for (int e = 0; e < per; ++e) {
        const int pair = unit_of<P>(chunk, e);
        const float slope = words[row / 32 * depth + pair] >> (row % 32) & 1 ? 1.0f : c.slope;
        sums[q] += slope * weights[pair];
        m.e[e] = from_float<E>(slope);
      }
      *reinterpret_cast<Chunk<P>*>(left + panel_at(row, chunk)) = m;
    }
    for (int n = threadIdx.x; n < kUnits * 8; n += kThreads) {
      constexpr int chunks = kUnits / per;  // per pair
      const int row = n / chunks, f = n % chunks * per;
      const int64_t pair = min(first + row, pairs - 1);
      const Features<P> x = load_features<P>(u, static_cast<int>(pair / c.N), c.B, feature + f, c.H1, aligned);
      const Features<P> y = load_features<P>(v, static_cast<int>(pair % c.N), c.N, feature + f, c.H1, aligned);
      *reinterpret_cast<Chunk<P>*>(right + f / depth * depth * kPanel + panel_at(row, f % depth / per)) =
          hidden_chunk<P>(x, y, c.slope, weights[row]);
    }
    __syncthreads();
#pragma unroll(kUnroll<P>)
    for (int k = 0; k < kSteps; ++k) {
      uint32_t l[2][4], r[8][2];
      load_left(l, left, warp / 2 * 32, k, lane);
      load_right_down<P>(r, right, depth, warp % 2 * 64, k, lane);
      multiply<P>(out, l, r);
    }
  }

  const int64_t part = static_cast<int64_t>(split) * c.G + group;
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int k = unit + warp / 2 * 32 + 8 * r + lane / 4, l = feature + warp % 2 * 64 + 8 * n + 2 * t + e;
        if (k < c.H2 && l < c.H1) a.product[(part * c.H2 + k) * c.H1 + l] = out[r / 2][n][r % 2 * 2 + e];
      }
#pragma unroll
  for (int q = 0; q < kUnits * 8 / kThreads; ++q) {
#pragma unroll
    for (int mask = 1; mask < 8; mask *= 2) sums[q] += __shfl_xor_sync(0xffffffff, sums[q], mask);
    const int k = unit + (threadIdx.x + q * kThreads) / 8;
    if (feature == 0 && lane % 8 == 0 && k < c.H2) a.sums[part * c.H2 + k] = sums[q];
  }
}

}  // namespace mk::mlp_critic
