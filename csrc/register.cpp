// Schemas of the compiled CPU operators. The operators allocate their outputs; Python validates inputs and owns
// autograd.
#include <torch/library.h>

#include "common/buffer.h"
#include "common/gemm.h"
#include "dot_critic/schema.h"

TORCH_LIBRARY(mi_kernels_cpu, m) {
  // whether oneDNN's brgemm multiplies tiles in fp32 and in bf16; where it does not, plain loops do
  m.def("brgemm() -> (bool, bool)", [] { return std::make_tuple(mk::has_brgemm_fp32(), mk::has_brgemm_bf16()); });
  // frees the small buffers kept between calls (at most 16 MiB), for tests and benchmarks that measure memory
  m.def("release_buffers() -> ()", [] { mk::Pool::instance().drain(); });
  m.def("dot_critic_stats(" MK_DOT_PROBLEM_SCHEMA ", int stats, float clip) -> (Tensor, Tensor, Tensor)");
  m.def("dot_critic_grad(" MK_DOT_PROBLEM_SCHEMA ", " MK_DOT_SLOPES_SCHEMA
        ", int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("dot_critic_loss(" MK_DOT_PROBLEM_SCHEMA
        ", float w_row, float w_col, float w_soft, float w_pos, bool soft_signed, bool normalize, int needs, "
        "int memory_budget) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("dot_critic_row_losses(" MK_DOT_PROBLEM_SCHEMA
        ", bool symmetric, bool normalize, bool keep) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("dot_critic_row_losses_grad(" MK_DOT_PROBLEM_SCHEMA
        ", Tensor row, Tensor col, Tensor scores, Tensor g, bool symmetric, bool normalize, int needs) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mlp_critic_forward(Tensor u, Tensor v, Tensor[] weights, Tensor[] biases, str activation, str output, "
      "bool off_diagonal, int stats, float clip, bool keep) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mlp_critic_backward(Tensor u, Tensor v, Tensor[] weights, Tensor[] biases, str activation, str output, "
      "bool off_diagonal, Tensor row_lse, Tensor col_lse, Tensor? g_positive, Tensor? g_row, Tensor? g_col, "
      "Tensor? g_sum, Tensor? g_soft, Tensor kept_scores, Tensor kept_masks, bool need_parameters) -> Tensor[]");
  m.def("club_forward(Tensor mu, Tensor? logvar, Tensor y) -> (Tensor, Tensor)");
  m.def(
      "club_backward(Tensor mu, Tensor? logvar, Tensor y, Tensor moments, Tensor g, int needs) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "lstm_scan_forward(Tensor gates, Tensor weight, Tensor? bias, Tensor? h0, Tensor? c0, Tensor? lengths, "
      "int steps, bool keep) -> (Tensor, Tensor, Tensor)");
  m.def(
      "lstm_scan_backward(Tensor weight, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor h, Tensor c, "
      "Tensor activations, Tensor? g_h, Tensor? g_c, int inputs, int needs) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lstm_forward(Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor? bias, Tensor? h0, Tensor? c0, "
      "Tensor? lengths, bool keep) -> (Tensor, Tensor, Tensor)");
  m.def(
      "lstm_backward(Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor h, "
      "Tensor c, Tensor activations, Tensor? g_h, Tensor? g_c, int needs) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "rbf_mmd(Tensor x, Tensor y, Tensor bandwidth, float w_xx, float w_yy, float w_xy, int needs) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("rbf_hsic(Tensor x, Tensor y, Tensor sx, Tensor sy) -> (Tensor, Tensor)");
  m.def(
      "rbf_hsic_grad(Tensor x, Tensor y, Tensor sx, Tensor sy, Tensor rows, Tensor g, int needs) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cross_attention_forward(Tensor[] query, Tensor[] key, Tensor[] value, Tensor[] query_lengths, "
      "Tensor[] key_lengths, int[] causal_offset, float[] scale, float[] dropout_p, Tensor seed, bool sparse) -> Tensor[]");
  m.def(
      "cross_attention_backward(Tensor[] grad_out, Tensor[] query, Tensor[] key, Tensor[] value, Tensor[] out, "
      "Tensor[] stat, Tensor[] query_lengths, Tensor[] key_lengths, int[] causal_offset, float[] scale, "
      "float[] dropout_p, Tensor seed, bool sparse) -> Tensor[]");
}
