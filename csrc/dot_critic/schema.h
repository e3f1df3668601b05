// The dot critic's bits, enums and common arguments, for CPU and CUDA. mi_kernels/ops/dot_critic/schema.py explains
// them and has the same values; a test compares the two.
#pragma once

#include <cstdint>

namespace mk::dot_critic {

enum Pairs : int64_t { kAll = 0, kOffDiagonal = 1, kUnequalIds = 2, kUnequalIdsOrPositive = 3 };
enum Stats : int64_t { kRowLse = 1, kColLse = 2, kSoftplus = 4, kSigned = 16 };
enum Needs : int64_t { kNeedX = 1, kNeedY = 2, kNeedRowBias = 4, kNeedColBias = 8, kNeedScale = 16 };

}  // namespace mk::dot_critic

// The arguments that define a problem, in the order of problem.py: as an operator's schema, as parameters, as
// arguments.
#define MK_DOT_PROBLEM_SCHEMA                                                                                      \
  "Tensor x, Tensor y, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor? row_ids, Tensor? col_ids, int pairs, " \
  "int positive_shift"
#define MK_DOT_PROBLEM_PARAMETERS                                                                                  \
  const Tensor &x, const Tensor &y, const Tensor &scale, const OptTensor &row_bias, const OptTensor &col_bias,         \
      const OptTensor &row_ids, const OptTensor &col_ids, int64_t pairs, int64_t shift
#define MK_DOT_PROBLEM x, y, scale, row_bias, col_bias, row_ids, col_ids, pairs, shift
// The further arguments of the gradient operators: the log-sum-exps and the weights of the terms of dS.
#define MK_DOT_SLOPES_SCHEMA                                                                                       \
  "Tensor? row_lse, Tensor? col_lse, Tensor? g_row, Tensor? g_col, Tensor? g_soft, Tensor? g_pos, bool soft_signed"
#define MK_DOT_SLOPES_PARAMETERS                                                                                   \
  const OptTensor &row_lse, const OptTensor &col_lse, const OptTensor &g_row, const OptTensor &g_col,                 \
      const OptTensor &g_soft, const OptTensor &g_pos, bool soft_signed
