// Row and column statistics of the dot critic's scores in one pass of N = 2 G B N D FLOPs; scores stay in registers.
//
//   row: (max_j S_ij, sum_j exp(S_ij - max)), sum_j softplus(S_ij);  column: the same over i
//
// A block processes the row tiles block, block + row_blocks, ... of one group against one range (`split`) of columns,
// in a fixed order. Row statistics stay in registers until the range ends. Column statistics are merged tile by tile
// into the block's own slice of the workspace; the same thread always merges the same column. combine_kernel merges
// splits and blocks. There are no atomics, so every run gives the same bits. Tiles are 128 x 128 and are fed by a
// three-stage ring of asynchronous copies, each 128 bytes of features deep. Traffic: a block reads its rows once per
// column tile and all columns of its range, mostly from L2. The workspace takes 8 (splits B + row_blocks N) bytes per
// group, with row_blocks <= 128.
#pragma once

#include "pairs.cuh"

namespace mk::dot_critic {

constexpr int kTile = 128, kStages = 3;
constexpr int kStage = 2 * kTile * kPanel;  // bytes: rows, then columns
constexpr int kStatisticsShared = kStages * kStage + kTile * (8 + 4 + 4) + kTile * 4 * 8;

struct StatisticsPlan {
  int row_tiles, column_tiles, row_blocks, splits;
  float *row_top_sum, *column_top_sum, *soft;  // [splits, G, B, 2], [row_blocks, G, N, 2], [splits, G, B]
};

// Per-row values of one tile in shared memory.
struct RowTile {
  int64_t* id;
  float* bias;
  int* positive;
};

struct Cursor {  // position in three nested loops: over row tiles, over column tiles, over panels (innermost)
  int row, column, panel;
  __device__ __forceinline__ void advance(const StatisticsPlan& plan, int first, int last, int panels) {
    if (++panel < panels) return;
    panel = 0;
    if (++column < last) return;
    column = first, row += plan.row_blocks;
  }
};

template <class P>
__device__ __forceinline__ void load_stage(unsigned char* stage, const Problem& p, const typename P::Element* x,
                                           const typename P::Element* y, const Cursor& at, bool aligned) {
  const int feature = at.panel * kPerPanel<P>;
  load_panel<P, kTile, kThreads>(stage, x, at.row * kTile, p.B, feature, p.D, aligned);
  load_panel<P, kTile, kThreads>(stage + kTile * kPanel, y, at.column * kTile, p.N, feature, p.D, aligned);
}

// Column statistics of one tile: each warp row reduces its 32 rows, then 128 threads merge the four results into the
// workspace slice.
__device__ __forceinline__ void merge_columns(float (&s)[2][8][4], float2* across, float* slice, int column, int N,
                                              bool first_visit, int warp, int lane) {
  const int warp_row = warp / 2, base = warp % 2 * 64;
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float top = fmaxf(fmaxf(s[0][j][e], s[0][j][e + 2]), fmaxf(s[1][j][e], s[1][j][e + 2]));
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, mask));
      const float reference = finite_reference(top);
      float sum = fast_exp(s[0][j][e] - reference) + fast_exp(s[0][j][e + 2] - reference) +
                  fast_exp(s[1][j][e] - reference) + fast_exp(s[1][j][e + 2] - reference);
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) sum += __shfl_xor_sync(0xffffffff, sum, mask);
      if (lane < 4) across[warp_row * kTile + base + 8 * j + 2 * lane + e] = make_float2(top, sum);
    }
  __syncthreads();
  const int j = threadIdx.x;
  if (j < kTile && column + j < N) {
    LogSum total{-MK_INFINITY, 0.0f};
    if (!first_visit) total = {slice[2 * (column + j)], slice[2 * (column + j) + 1]};
#pragma unroll
    for (int w = 0; w < 4; ++w) total = merge(total, {across[w * kTile + j].x, across[w * kTile + j].y});
    slice[2 * (column + j)] = total.top, slice[2 * (column + j) + 1] = total.sum;
  }
}

// Merges the row statistics of a tile over the four lanes and two warps that share a row, and writes them.
__device__ __forceinline__ void finish_rows(const LogSum (&rows)[4], const float (&soft)[4], float* across,
                                            float* top_sum, float* soft_out, int row, int B, int warp, int lane) {
  const int local = warp / 2 * 32 + lane / 4;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    LogSum v = rows[r];
    float total = soft[r];
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
      v = merge(v, {__shfl_xor_sync(0xffffffff, v.top, mask), __shfl_xor_sync(0xffffffff, v.sum, mask)});
      total += __shfl_xor_sync(0xffffffff, total, mask);
    }
    float* to = across + (warp % 2 * kTile + local + 8 * r) * 4;
    if (lane % 4 == 0) to[0] = v.top, to[1] = v.sum, to[2] = total;
  }
  __syncthreads();
  const int i = threadIdx.x;
  if (i < kTile && row + i < B) {
    const float *a = across + 4 * i, *b = across + 4 * (kTile + i);
    const LogSum v = merge({a[0], a[1]}, {b[0], b[1]});
    if (top_sum) top_sum[2 * (row + i)] = v.top, top_sum[2 * (row + i) + 1] = v.sum;
    if (soft_out) soft_out[row + i] = a[2] + b[2];
  }
}

template <class P>
__global__ void __launch_bounds__(kThreads) statistics_kernel(const Problem p, const Statistics s,
                                                              const StatisticsPlan plan, const bool aligned) {
  using E = typename P::Element;
  unsigned char* memory = shared_memory<unsigned char, kStatisticsShared>();
  RowTile rows;
  rows.id = reinterpret_cast<int64_t*>(memory + kStages * kStage);
  rows.bias = reinterpret_cast<float*>(rows.id + kTile);
  rows.positive = reinterpret_cast<int*>(rows.bias + kTile);
  float* across = reinterpret_cast<float*>(rows.positive + kTile);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = warp / 2 * 32, warp_column = warp % 2 * 64;
  const int block = blockIdx.x % plan.row_blocks, rest = blockIdx.x / plan.row_blocks;
  const int split = rest % plan.splits, group = rest / plan.splits;
  const int first = static_cast<int>(static_cast<int64_t>(plan.column_tiles) * split / plan.splits);
  const int last = static_cast<int>(static_cast<int64_t>(plan.column_tiles) * (split + 1) / plan.splits);
  const E* x = static_cast<const E*>(p.x) + static_cast<int64_t>(group) * p.B * p.D;
  const E* y = static_cast<const E*>(p.y) + static_cast<int64_t>(group) * p.N * p.D;
  const int64_t row_offset = static_cast<int64_t>(group) * p.B, column_offset = static_cast<int64_t>(group) * p.N;
  const int64_t split_offset = (static_cast<int64_t>(split) * p.G + group) * p.B;
  float* slice = plan.column_top_sum + 2 * ((static_cast<int64_t>(block) * p.G + group) * p.N);
  const float scale = p.scale[group];
  const int panels = (p.D + kPerPanel<P> - 1) / kPerPanel<P>;
  const bool lse = s.row_lse || s.col_lse, need_positive = p.shift >= 0 && (p.pairs == kUnequalIdsOrPositive || s.soft_signed);

  Cursor ahead{block, first, 0};
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (ahead.row < plan.row_tiles) load_stage<P>(memory + stage * kStage, p, x, y, ahead, aligned);
    copy_async_commit();
    ahead.advance(plan, first, last, panels);
  }
  int stage = 0;
  for (int row_tile = block; row_tile < plan.row_tiles; row_tile += plan.row_blocks) {
    const int row = row_tile * kTile;
    if (threadIdx.x < kTile) {
      const int i = row + threadIdx.x;
      rows.id[threadIdx.x] = element<int64_t>(p.pairs >= kUnequalIds ? p.row_ids : nullptr, row_offset + i, i < p.B, 0);
      rows.bias[threadIdx.x] = element(p.row_bias, row_offset + i, i < p.B, 0.0f);
      rows.positive[threadIdx.x] = need_positive ? static_cast<int>((static_cast<int64_t>(i) + p.shift) % p.N) : -1;
    }
    LogSum top_sum[4];
    float soft[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) top_sum[r] = {-MK_INFINITY, 0.0f}, soft[r] = 0.0f;

    for (int column_tile = first; column_tile < last; ++column_tile) {
      float c[2][8][4];
      clear(c);
      for (int panel = 0; panel < panels; ++panel) {
        copy_async_wait<kStages - 2>();
        __syncthreads();
        const int next = stage == 0 ? kStages - 1 : stage - 1;  // no warp reads the previous stage any more
        if (ahead.row < plan.row_tiles) load_stage<P>(memory + next * kStage, p, x, y, ahead, aligned);
        copy_async_commit();
        ahead.advance(plan, first, last, panels);
        const unsigned char* at = memory + stage * kStage;
        multiply_panel<P>(c, at, warp_row, at + kTile * kPanel, warp_column, lane);
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      const int column = column_tile * kTile + warp_column + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int k = column + 8 * j + e;
          const float bias = element(p.col_bias, column_offset + k, k < p.N, 0.0f);
          const int64_t id = element<int64_t>(p.pairs >= kUnequalIds ? p.col_ids : nullptr, column_offset + k, k < p.N, 0);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int i = warp_row + lane / 4 + 8 * r;
            float& score = c[r / 2][j][r % 2 * 2 + e];
            const bool positive = need_positive & (rows.positive[i] == k);
            const bool inside = (row + i < p.B) & (k < p.N);
            const float value = score * scale + rows.bias[i] + bias;
            score = inside & allowed(p.pairs, row + i, k, rows.id[i], id, positive) ? value : -MK_INFINITY;
          }
        }
      if (s.soft) {  // softplus(-inf) is 0, so excluded pairs add nothing
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float value = c[r / 2][j][r % 2 * 2 + e];
              const bool flip = s.soft_signed & (rows.positive[warp_row + lane / 4 + 8 * r] == column + 8 * j + e) &
                                (value > -MK_INFINITY);
              soft[r] += softplus(flip ? -value : value);
            }
      }
      if (!lse) continue;
      if (s.clip < MK_INFINITY) {
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) c[r / 2][j][r % 2 * 2 + e] = clamped(c[r / 2][j][r % 2 * 2 + e], s.clip);
      }
      if (s.row_lse) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float top = top_sum[r].top;
#pragma unroll
          for (int j = 0; j < 8; ++j) top = fmaxf(top, fmaxf(c[r / 2][j][r % 2 * 2], c[r / 2][j][r % 2 * 2 + 1]));
          const float reference = finite_reference(top);
          float sum = top_sum[r].sum * fast_exp(top_sum[r].top - reference);
#pragma unroll
          for (int j = 0; j < 8; ++j)
            sum += fast_exp(c[r / 2][j][r % 2 * 2] - reference) + fast_exp(c[r / 2][j][r % 2 * 2 + 1] - reference);
          top_sum[r] = {top, sum};
        }
      }
      if (s.col_lse)
        merge_columns(c, reinterpret_cast<float2*>(across), slice, column_tile * kTile, p.N, row_tile == block, warp, lane);
    }
    __syncthreads();  // before `across` is reused for the rows, and before this tile's per-row values are overwritten
    if (s.row_lse || s.soft)
      finish_rows(top_sum, soft, across, s.row_lse ? plan.row_top_sum + 2 * split_offset : nullptr,
                  s.soft ? plan.soft + split_offset : nullptr, row, p.B, warp, lane);
  }
}

// The log-sum-exp of `parts` partial results, merged in order.
__device__ __forceinline__ float combined(const float* top_sum, int parts, int64_t stride, int64_t i) {
  LogSum total{-MK_INFINITY, 0.0f};
  for (int k = 0; k < parts; ++k) total = merge(total, {top_sum[2 * (k * stride + i)], top_sum[2 * (k * stride + i) + 1]});
  return log_of(total);
}

static __global__ void __launch_bounds__(kThreads) combine_kernel(const Problem p, const Statistics s,
                                                                  const StatisticsPlan plan) {
  const int64_t rows = static_cast<int64_t>(p.G) * p.B, columns = static_cast<int64_t>(p.G) * p.N;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < rows) {
    if (s.row_lse) s.row_lse[i] = combined(plan.row_top_sum, plan.splits, rows, i);
    if (s.soft) {
      float total = 0.0f;
      for (int k = 0; k < plan.splits; ++k) total += plan.soft[k * rows + i];
      s.soft[i] = total;
    }
  } else if (s.col_lse && i - rows < columns) {
    s.col_lse[i - rows] = combined(plan.column_top_sum, plan.row_blocks, columns, i - rows);
  }
}

}  // namespace mk::dot_critic
