// Launchers of the MLP critic's CUDA kernels: two hidden layers, ReLU or leaky ReLU. Arrays are contiguous and on the
// device.
#pragma once

#include <cstdint>

#include "../common/cuda/runtime.h"

namespace mk::mlp_critic {

enum class Precision { bf16, fp16, tf32, fp32 };  // of the matrix products; tf32 and fp32 (3xTF32) take fp32 operands

// S[i, j] = out(sum_k w[k] act(sum_l w2[k, l] act(u_i + v_j)[l] + b2[k]) + b). Row 0 is row first_row of the whole S.
struct Critic {
  const float *u, *v;          // [G, B, H1], [G, N, H1]
  const void* w2;              // [G or 1, H2, H1], of the products' type
  const float *b2, *w, *b;     // [G or 1, H2], [G or 1, H2], [G or 1]
  int G, B, N, H1, H2, first_row;
  bool own, softplus, off_diagonal;  // own: each group has its own parameters
  float slope;                       // of the activation for negative inputs
};

struct Statistics {  // outputs [G, B], or [G, N] for columns; null if not requested
  float *positive, *row_sum, *row_lse, *row_soft, *clipped, *col_lse;
  float clip;
  float* scores;   // [G, B, N] before the output activation, or null
  uint32_t* bits;  // [G, B, ceil(H2 / 32), N], or null: bit k % 32 of word k / 32 tells whether unit k is positive
  float* workspace;
};

struct ScoreGradients {  // g_*: gradients of the loss with respect to the statistics; null if zero
  const float *row_lse, *col_lse, *g_positive, *g_row, *g_col, *g_sum, *g_soft;
  const float* scores;
  float* g;  // [G, B, N]: dL / d(score before the output activation)
};

struct LayerGradients {
  const float* g;
  const float* gain;       // [1] or null: g is divided by it before rounding
  const uint32_t* bits;
  const void* folded;      // diag(w) w2, [G or 1, H2, H1]
  int row_blocks, splits;  // number of partial sums: of dv, and of product and sums
  float *du, *dv;          // [G, B, H1], [row_blocks, G, N, H1]
  float *product, *sums;   // [splits, G, H2, H1]: sum_p m[p, k] (g_p / gain) h1[p, l]; [splits, G, H2]: sum_p m g
};

int64_t statistics_workspace(const Critic& c, const Statistics& s);
cudaError_t statistics(Precision precision, const Critic& c, const Statistics& s, cudaStream_t stream);
cudaError_t score_gradients(const Critic& c, const ScoreGradients& g, cudaStream_t stream);
cudaError_t input_gradients(Precision precision, const Critic& c, const LayerGradients& g, cudaStream_t stream);
cudaError_t weight_gradients(Precision precision, const Critic& c, const LayerGradients& g, cudaStream_t stream);
int most_row_blocks(const Critic& c);  // with more parts of dv than this, some would be empty
int most_splits(const Critic& c);

}  // namespace mk::mlp_critic
