// Launchers of the MLP critic.
#include "launch.cuh"

#include <algorithm>

#include "backward.cuh"
#include "forward.cuh"

namespace mk::mlp_critic {
namespace {

#ifndef MK_ROW_BLOCKS
#define MK_ROW_BLOCKS 256
#endif
constexpr int kRowBlocks = MK_ROW_BLOCKS;  // bounds the workspace of column statistics: 8 bytes per block and column
constexpr int kBlocks = 512;               // target for the grid

Plan plan_of(const Critic& c, const Statistics& s) {
  Plan plan{};
  plan.row_tiles = ceil_div(c.B, kRows), plan.column_tiles = ceil_div(c.N, kColumns);
  plan.row_blocks = s.col_lse ? std::min(plan.row_tiles, kRowBlocks) : plan.row_tiles;
  const int64_t blocks = std::max<int64_t>(static_cast<int64_t>(plan.row_blocks) * c.G, 1);
  plan.splits = std::clamp(ceil_div(kBlocks, blocks), 1, plan.column_tiles);
  const int64_t rows = static_cast<int64_t>(plan.splits) * c.G * c.B;
  plan.lse = s.workspace;
  plan.clipped = plan.lse + (s.row_lse ? 2 * rows : 0);
  plan.columns = plan.clipped + (s.clipped ? 2 * rows : 0);
  plan.sum = plan.columns + (s.col_lse ? 2 * static_cast<int64_t>(plan.row_blocks) * c.G * c.N : 0);
  plan.soft = plan.sum + rows;
  return plan;
}

template <class P>
bool aligned(const Critic& c, const void* matrix) {
  return aligned_rows(c.u, c.v, c.H1 * sizeof(typename P::Element)) && reinterpret_cast<uintptr_t>(matrix) % kChunk == 0;
}

// Calls f.template operator()<P>() with the operand type of a precision.
template <class F>
cudaError_t in(Precision precision, F f) {
  switch (precision) {
    case Precision::bf16: return f.template operator()<InBf16>();
    case Precision::fp16: return f.template operator()<InFp16>();
    case Precision::tf32: return f.template operator()<InTf32>();
    default: return f.template operator()<InFp32>();
  }
}

}  // namespace

int most_row_blocks(const Critic& c) { return ceil_div(c.B, kRows); }

int most_splits(const Critic& c) {
  const int64_t blocks = static_cast<int64_t>(c.G) * ceil_div(c.H1, kUnits) * ceil_div(c.H2, kUnits);
  const int64_t steps = ceil_div(static_cast<int64_t>(c.B) * c.N, 64);
  return static_cast<int>(std::clamp<int64_t>(kBlocks / std::max<int64_t>(blocks, 1), 1, steps));
}

int64_t statistics_workspace(const Critic& c, const Statistics& s) {
  const Plan plan = plan_of(c, s);
  const int64_t rows = static_cast<int64_t>(plan.splits) * c.G * c.B;
  return rows * ((s.row_lse ? 2 : 0) + (s.clipped ? 2 : 0) + (s.row_soft ? 2 : 1)) +
         (s.col_lse ? 2 * static_cast<int64_t>(plan.row_blocks) * c.G * c.N : 0);
}

cudaError_t statistics(Precision precision, const Critic& c, const Statistics& s, cudaStream_t stream) {
  const Plan plan = plan_of(c, s);
  const dim3 grid(static_cast<unsigned>(plan.row_blocks) * plan.splits * c.G);
  const cudaError_t error = in(precision, [&]<class P>() {
    return launch(forward_kernel<P>, grid, kThreads, kForwardShared, stream, c, s, plan, aligned<P>(c, c.w2));
  });
  if (error != cudaSuccess) return error;
  const int64_t outputs = static_cast<int64_t>(c.G) * (c.B + (s.col_lse ? c.N : 0));
  return launch(combine_kernel, dim3(ceil_div(outputs, kThreads)), kThreads, 0, stream, c, s, plan);
}

cudaError_t score_gradients(const Critic& c, const ScoreGradients& g, cudaStream_t stream) {
  const int64_t pairs = static_cast<int64_t>(c.G) * c.B * c.N;
  return launch(score_gradient_kernel, dim3(ceil_div(pairs, kThreads)), kThreads, 0, stream, c, g);
}

cudaError_t input_gradients(Precision precision, const Critic& c, const LayerGradients& g, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(g.row_blocks) * ceil_div(c.H1, kUnits) * c.G);
  return in(precision, [&]<class P>() {
    return launch(input_kernel<P>, grid, kThreads, kInputShared, stream, c, g, ceil_div(c.B, kRows), aligned<P>(c, g.folded));
  });
}

cudaError_t weight_gradients(Precision precision, const Critic& c, const LayerGradients& g, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(c.H1, kUnits)) * ceil_div(c.H2, kUnits) * g.splits * c.G);
  return in(precision, [&]<class P>() {
    return launch(product_kernel<P>, grid, kThreads, kProductShared<P>, stream, c, g, aligned<P>(c, c.u));
  });
}

}  // namespace mk::mlp_critic
