// Launchers of the dot critic's CUDA kernels. Arrays are contiguous and on the device, vectors are fp32, and a null
// pointer means that an input is absent or an output is not requested.
#pragma once

#include <cstdint>

#include "../common/cuda/runtime.h"

namespace mk::dot_critic {

enum class Precision { bf16, fp16, tf32, fp32 };  // of the matrix products; tf32 and fp32 (3xTF32) take fp32 inputs

struct Problem {  // S = scale x y^T + row_bias + col_bias; x [G, B, D], y [G, N, D], scale [G], vectors [G, B], [G, N]
  const void *x, *y;
  const float *scale, *row_bias, *col_bias;
  const int64_t *row_ids, *col_ids;
  int G, B, N, D, pairs, shift;  // shift < 0: no positive pairs
};

struct Statistics {
  float *row_lse, *col_lse, *soft;  // [G, B], [G, N], [G, B]
  bool soft_signed;
  float clip;  // infinity: no clipping
  float* workspace;  // as many floats as statistics_workspace returns
};

struct Gradients {
  const float *row_lse, *col_lse, *g_row, *g_col, *g_soft, *g_pos;
  bool soft_signed;
  const float* gain;  // [1] or null: dS is divided by it before rounding, and the products are multiplied by it
  float *dx, *dy, *row_bias, *col_bias, *scale_rows;  // last three: row and column sums of dS, row sums of dS <x, y>
};

int64_t statistics_workspace(const Problem& p, const Statistics& s);
cudaError_t statistics(Precision precision, const Problem& p, const Statistics& s, cudaStream_t stream);
cudaError_t gradients(Precision precision, const Problem& p, const Gradients& g, cudaStream_t stream);

}  // namespace mk::dot_critic
