// Scores and statistics of the MLP critic. Activations never leave a block; scores do only on request.
//
// A block processes the row tiles block, block + row_blocks, ... of one group against one range of columns. For a tile
// of 128 pairs it builds act(u_i + v_j) in shared memory (once if H1 features fit 1024 bytes, otherwise for every block
// of 128 units of the second layer), streams w2 through a two-stage ring, and sums act(z) weighted by w in registers.
// Row statistics stay in the threads that own the rows; column statistics are merged into the block's slice of the
// workspace. combine_kernel merges splits and blocks in a fixed order. This takes M = 2 G B N H1 H2 FLOPs. w2 is read
// once per tile of pairs, from L2; if a backward follows, 4 bytes and one bit per unit are written for each pair.
#pragma once

#include "pairs.cuh"

namespace mk::mlp_critic {

constexpr int kHiddenPanels = 8;
constexpr int kForwardShared = kHiddenPanels * kPanelBytes + 2 * kUnits * kPanel + 2 * kPairs * 4;

struct Plan {
  int row_tiles, column_tiles, row_blocks, splits;
  float *lse, *clipped, *sum, *soft, *columns;  // [splits, G, B, 2] twice, [splits, G, B] twice, [row_blocks, G, N, 2]
};

struct RowState {
  LogSum lse, clipped;
  float sum, soft;
};

template <class P>
__device__ __forceinline__ void build_hidden(unsigned char* panel, const float* u, const float* v, const Critic& c,
                                             int row, int column, int first, bool aligned) {
#pragma unroll 2
  for (int i = threadIdx.x; i < kPairs * 8; i += kThreads) {
    const int pair = i / 8, chunk = i % 8, f = first + chunk * kPerChunk<P>;
    const Features<P> a = load_features<P>(u, row + pair / kColumns, c.B, f, c.H1, aligned);
    const Features<P> b = load_features<P>(v, column + pair % kColumns, c.N, f, c.H1, aligned);
    *reinterpret_cast<Chunk<P>*>(panel + panel_at(pair, chunk)) = hidden_chunk<P>(a, b, c.slope, 1.0f);
  }
}

// Adds sum_k w[k] act(z[p, k]) over a block of units to the scores of a thread's four pairs, and stores the bits z > 0.
__device__ __forceinline__ void reduce_units(const float (&z)[2][8][4], float (&score)[4], const float* b2, const float* w,
                                             const Critic& c, uint32_t* bits, int row, int column, int first, int warp,
                                             int lane) {
  uint32_t words[4][2];
#pragma unroll
  for (int r = 0; r < 4; ++r) words[r][0] = words[r][1] = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int k = first + warp % 2 * 64 + 8 * j + lane % 4 * 2 + e;
      const float bias = k < c.H2 ? b2[k] : 0.0f, weight = k < c.H2 ? w[k] : 0.0f;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float value = z[r / 2][j][r % 2 * 2 + e] + bias;
        score[r] += weight * activate(value, c.slope);
        words[r][j / 4] |= (value > 0.0f ? 1u : 0u) << (8 * (j % 4) + lane % 4 * 2 + e);
      }
    }
  if (bits == nullptr) return;
  const int n_words = ceil_div(c.H2, 32);
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t word = words[r][h];
      word |= __shfl_xor_sync(0xffffffff, word, 1);
      word |= __shfl_xor_sync(0xffffffff, word, 2);
      const int pair = warp / 2 * 32 + 8 * r + lane / 4, i = row + pair / kColumns, j = column + pair % kColumns;
      const int at = first / 32 + warp % 2 * 2 + h;
      if (lane % 4 == 0 && i < c.B && j < c.N && at < n_words) bits[(static_cast<int64_t>(i) * n_words + at) * c.N + j] = word;
    }
}

// Updates the statistics from the tile's scores in shared memory: threads 0..15 the rows', threads 32..39 the columns'.
__device__ __forceinline__ void tile_statistics(const Critic& c, const Statistics& s, const float* scores, RowState& state,
                                                float* slice, float* positive, int row, int column, bool first_visit) {
  const int thread = threadIdx.x;
  auto taken = [&](int i, int j) { return i < c.B && j < c.N && !(c.off_diagonal && i + c.first_row == j); };
  if (thread < kRows && row + thread < c.B) {
    const int i = row + thread;
    for (int k = 0; k < kColumns; ++k) {
      const int j = column + k;
      const float score = scores[kColumns * thread + k];
      if (positive && j < c.N && i + c.first_row == j) positive[i] = score;
      if (!taken(i, j)) continue;
      state.sum += score;
      if (s.row_soft) state.soft += softplus(score);
      if (s.row_lse) state.lse = merge(state.lse, {score, 1.0f});
      const float clipped = score > s.clip ? s.clip : score < -s.clip ? -s.clip : score;  // NaN propagates
      if (s.clipped) state.clipped = merge(state.clipped, {clipped, 1.0f});
    }
  }
  const int k = thread - 32, j = column + k;
  if (s.col_lse && k >= 0 && k < kColumns && j < c.N) {
    LogSum total{-MK_INFINITY, 0.0f};
    if (!first_visit) total = {slice[2 * j], slice[2 * j + 1]};
    for (int i = 0; i < kRows; ++i)
      if (taken(row + i, j)) total = merge(total, {scores[kColumns * i + k], 1.0f});
    slice[2 * j] = total.top, slice[2 * j + 1] = total.sum;
  }
}

template <class P>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Critic c, const Statistics s, const Plan plan,
                                                           const bool aligned) {
  using E = typename P::Element;
  unsigned char* hidden = shared_memory<unsigned char, kForwardShared>();
  unsigned char* ring = hidden + kHiddenPanels * kPanelBytes;
  float* gathered = reinterpret_cast<float*>(ring + 2 * kUnits * kPanel);  // [2, kPairs]: a row per half block of units

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int block = blockIdx.x % plan.row_blocks, rest = blockIdx.x / plan.row_blocks;
  const int split = rest % plan.splits, group = rest / plan.splits, of = c.own ? group : 0;
  const int first = static_cast<int>(static_cast<int64_t>(plan.column_tiles) * split / plan.splits);
  const int last = static_cast<int>(static_cast<int64_t>(plan.column_tiles) * (split + 1) / plan.splits);
  const int64_t rows_before = static_cast<int64_t>(group) * c.B, columns_before = static_cast<int64_t>(group) * c.N;
  const float *u = c.u + rows_before * c.H1, *v = c.v + columns_before * c.H1;
  const E* w2 = static_cast<const E*>(c.w2) + static_cast<int64_t>(of) * c.H2 * c.H1;
  const float *b2 = c.b2 + static_cast<int64_t>(of) * c.H2, *w = c.w + static_cast<int64_t>(of) * c.H2;
  const int64_t split_offset = (static_cast<int64_t>(split) * c.G + group) * c.B;
  float* slice = plan.columns + 2 * ((static_cast<int64_t>(block) * c.G + group) * c.N);
  float* positive = s.positive ? s.positive + rows_before : nullptr;
  float* scores = s.scores ? s.scores + rows_before * c.N : nullptr;
  uint32_t* bits = s.bits ? s.bits + rows_before * ceil_div(c.H2, 32) * c.N : nullptr;
  const int panels = ceil_div(c.H1, kPerPanel<P>), unit_blocks = ceil_div(c.H2, kUnits), steps = panels * unit_blocks;
  auto stream = [&](int step) {
    if (step < steps)
      load_panel<P, kUnits, kThreads>(ring + step % 2 * kUnits * kPanel, w2, step / panels * kUnits, c.H2,
                                      step % panels * kPerPanel<P>, c.H1, aligned);
    copy_async_commit();
  };

  for (int row_tile = block; row_tile < plan.row_tiles; row_tile += plan.row_blocks) {
    const int row = row_tile * kRows;
    RowState state{{-MK_INFINITY, 0.0f}, {-MK_INFINITY, 0.0f}, 0.0f, 0.0f};
    for (int column_tile = first; column_tile < last; ++column_tile) {
      const int column = column_tile * kColumns;
      float score[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      float z[2][8][4];
      stream(0);
      for (int step = 0; step < steps; ++step) {
        const int panel = step % panels, units = step / panels * kUnits;
        const bool resident = panels <= kHiddenPanels;
        unsigned char* from = hidden + (resident ? panel : step % kHiddenPanels) * kPanelBytes;
        if (units == 0 || !resident) build_hidden<P>(from, u, v, c, row, column, panel * kPerPanel<P>, aligned);
        copy_async_wait<0>();
        __syncthreads();
        stream(step + 1);
        if (panel == 0) clear(z);
        multiply_panel<P, kUnroll<P>>(z, from, warp / 2 * 32, ring + step % 2 * kUnits * kPanel, warp % 2 * 64, lane);
        if (panel == panels - 1) reduce_units(z, score, b2, w, c, bits, row, column, units, warp, lane);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        score[r] += __shfl_xor_sync(0xffffffff, score[r], 1);
        score[r] += __shfl_xor_sync(0xffffffff, score[r], 2);
        if (lane % 4 == 0) gathered[warp % 2 * kPairs + warp / 2 * 32 + 8 * r + lane / 4] = score[r];
      }
      __syncthreads();
      if (threadIdx.x < kPairs) {
        const int pair = threadIdx.x, i = row + pair / kColumns, j = column + pair % kColumns;
        const float raw = gathered[pair] + gathered[kPairs + pair] + c.b[of];
        if (scores && i < c.B && j < c.N) scores[static_cast<int64_t>(i) * c.N + j] = raw;
        gathered[pair] = c.softplus ? softplus(raw) : raw;
      }
      __syncthreads();
      tile_statistics(c, s, gathered, state, slice, positive, row, column, row_tile == block);
    }
    if (threadIdx.x < kRows && row + threadIdx.x < c.B) {
      const int64_t at = split_offset + row + threadIdx.x;
      plan.sum[at] = state.sum;
      if (s.row_soft) plan.soft[at] = state.soft;
      if (s.row_lse) plan.lse[2 * at] = state.lse.top, plan.lse[2 * at + 1] = state.lse.sum;
      if (s.clipped) plan.clipped[2 * at] = state.clipped.top, plan.clipped[2 * at + 1] = state.clipped.sum;
    }
  }
}

__device__ __forceinline__ float combined(const float* top_sum, int parts, int64_t stride, int64_t i) {
  LogSum total{-MK_INFINITY, 0.0f};
  for (int k = 0; k < parts; ++k) total = merge(total, {top_sum[2 * (k * stride + i)], top_sum[2 * (k * stride + i) + 1]});
  return log_of(total);
}

static __global__ void __launch_bounds__(kThreads) combine_kernel(const Critic c, const Statistics s, const Plan plan) {
  const int64_t rows = static_cast<int64_t>(c.G) * c.B, columns = static_cast<int64_t>(c.G) * c.N;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < rows) {
    float sum = 0.0f, soft = 0.0f;
    for (int k = 0; k < plan.splits; ++k) sum += plan.sum[k * rows + i];
    if (s.row_sum) s.row_sum[i] = sum;
    for (int k = 0; k < plan.splits && s.row_soft; ++k) soft += plan.soft[k * rows + i];
    if (s.row_soft) s.row_soft[i] = soft;
    if (s.row_lse) s.row_lse[i] = combined(plan.lse, plan.splits, rows, i);
    if (s.clipped) s.clipped[i] = combined(plan.clipped, plan.splits, rows, i);
  } else if (s.col_lse && i - rows < columns) {
    s.col_lse[i - rows] = combined(plan.columns, plan.row_blocks, columns, i - rows);
  }
}

}  // namespace mk::mlp_critic
