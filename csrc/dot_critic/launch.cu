// Launchers of the dot critic: choose the kernel for a precision and a number of features.
#include "launch.cuh"

#include <algorithm>

#include "backward.cuh"
#include "forward.cuh"

namespace mk::dot_critic {
namespace {

#ifndef MK_ROW_BLOCKS
#define MK_ROW_BLOCKS 128
#endif
constexpr int kRowBlocks = MK_ROW_BLOCKS;  // per group, if groups are few; bounds the workspace of column statistics
constexpr int kLeastRowBlocks = std::min(8, kRowBlocks), kBlocks = 256;  // per group, if groups are many; grid's target

int tiles(int64_t n, int64_t tile) { return static_cast<int>((n + tile - 1) / tile); }

StatisticsPlan plan_of(const Problem& p, const Statistics& s) {
  StatisticsPlan plan{};
  plan.row_tiles = tiles(p.B, kTile), plan.column_tiles = tiles(p.N, kTile);
  const int most = s.col_lse ? std::max(kLeastRowBlocks, kRowBlocks / std::max(p.G, 1)) : plan.row_tiles;
  plan.row_blocks = std::min(plan.row_tiles, most);
  const int64_t blocks = static_cast<int64_t>(plan.row_blocks) * p.G;
  plan.splits = std::clamp(tiles(kBlocks, std::max<int64_t>(blocks, 1)), 1, plan.column_tiles);
  const int64_t rows = static_cast<int64_t>(plan.splits) * p.G * p.B;
  plan.row_top_sum = s.workspace;
  plan.soft = plan.row_top_sum + (s.row_lse ? 2 * rows : 0);
  plan.column_top_sum = plan.soft + (s.soft ? rows : 0);
  return plan;
}

bool aligned_rows(const void* x, const void* y, int64_t row_bytes) {
  return row_bytes % kChunk == 0 && reinterpret_cast<uintptr_t>(x) % kChunk == 0 && reinterpret_cast<uintptr_t>(y) % kChunk == 0;
}

template <class P>
cudaError_t statistics_in(const Problem& p, const Statistics& s, cudaStream_t stream) {
  const StatisticsPlan plan = plan_of(p, s);
  const bool aligned = aligned_rows(p.x, p.y, p.D * sizeof(typename P::Element));
  const dim3 grid(static_cast<unsigned>(plan.row_blocks) * plan.splits * p.G);
  const cudaError_t error = launch(statistics_kernel<P>, grid, kThreads, kStatisticsShared, stream, p, s, plan, aligned);
  if (error != cudaSuccess) return error;
  const int64_t outputs = static_cast<int64_t>(p.G) * (p.B + (s.col_lse ? p.N : 0));
  return launch(combine_kernel, dim3(tiles(outputs, kThreads)), kThreads, 0, stream, p, s, plan);
}

template <class P, class S>
cudaError_t gradients_in(GradientArguments a, cudaStream_t stream) {
  const bool x = a.x.out || a.x.out_bias || a.scale_rows, y = a.y.out || a.y.out_bias;
  a.x_tiles = x ? tiles(a.x.n, S::BM) : 0, a.y_tiles = y ? tiles(a.y.n, S::BM) : 0;
  const int width = S::BO / static_cast<int>(sizeof(typename P::Element));
  a.feature_blocks = a.x.out || a.y.out ? tiles(a.D, width) : 1;
  a.aligned = aligned_rows(a.x.data, a.y.data, a.D * sizeof(typename P::Element));
  const dim3 grid(static_cast<unsigned>(a.x_tiles + a.y_tiles) * a.feature_blocks * a.G);
  return launch(gradient_kernel<P, S>, grid, kThreads, S::shared, stream, a);
}

template <class P>
cudaError_t gradients_by_width(const GradientArguments& a, cudaStream_t stream) {
  constexpr bool short_elements = sizeof(typename P::Element) == 2;
  using Narrow = std::conditional_t<short_elements, Shape<128, 64, 256, false>, Shape<64, 32, 512, false>>;
  const int64_t bytes = static_cast<int64_t>(a.D) * sizeof(typename P::Element);
  if (bytes <= Narrow::BO) return gradients_in<P, Narrow>(a, stream);
  if (bytes <= 1024) return gradients_in<P, Shape<64, 32, 1024, false>>(a, stream);
  return gradients_in<P, Shape<64, 32, 1024, true>>(a, stream);
}

}  // namespace

int64_t statistics_workspace(const Problem& p, const Statistics& s) {
  const StatisticsPlan plan = plan_of(p, s);
  const int64_t rows = static_cast<int64_t>(plan.splits) * p.G * p.B;
  return (s.row_lse ? 2 * rows : 0) + (s.soft ? rows : 0) +
         (s.col_lse ? 2 * static_cast<int64_t>(plan.row_blocks) * p.G * p.N : 0);
}

cudaError_t statistics(Precision precision, const Problem& problem, const Statistics& s, cudaStream_t stream) {
  Problem p = problem;
  if (p.shift >= 0) p.shift %= p.N;
  switch (precision) {
    case Precision::bf16: return statistics_in<InBf16>(p, s, stream);
    case Precision::fp16: return statistics_in<InFp16>(p, s, stream);
    case Precision::tf32: return statistics_in<InTf32>(p, s, stream);
    default: return statistics_in<InFp32>(p, s, stream);
  }
}

cudaError_t gradients(Precision precision, const Problem& p, const Gradients& g, cudaStream_t stream) {
  GradientArguments a{};
  a.x = {p.x, p.row_bias, g.row_lse, g.g_row, p.row_ids, g.dx, g.row_bias, p.B};
  a.y = {p.y, p.col_bias, g.col_lse, g.g_col, p.col_ids, g.dy, g.col_bias, p.N};
  a.scale = p.scale, a.gain = g.gain, a.g_soft = g.g_soft, a.g_pos = g.g_pos, a.scale_rows = g.scale_rows;
  a.G = p.G, a.D = p.D, a.pairs = p.pairs, a.shift = p.shift >= 0 ? p.shift % p.N : -1, a.soft_signed = g.soft_signed;
  switch (precision) {
    case Precision::bf16: return gradients_by_width<InBf16>(a, stream);
    case Precision::fp16: return gradients_by_width<InFp16>(a, stream);
    case Precision::tf32: return gradients_by_width<InTf32>(a, stream);
    default: return gradients_by_width<InFp32>(a, stream);
  }
}

}  // namespace mk::dot_critic
