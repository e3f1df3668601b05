// The MLP critic's operators on CUDA tensors (with the emulator: on CPU tensors): two hidden layers, ReLU or leaky
// ReLU. Python has validated the inputs, expanded the parameters to one group or all groups, and chosen the chunk of
// rows.
#ifdef MI_KERNELS_WITH_CUDA

#include <ATen/ops/empty.h>

#include <algorithm>

#include "../common/cuda/torch.h"
#include "launch.cuh"
#include "schema.h"

namespace mk::mlp_critic {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

Precision precision_of(const Tensor& w2, bool tf32) {
  switch (w2.scalar_type()) {
    case at::kBFloat16: return Precision::bf16;
    case at::kHalf: return Precision::fp16;
    case at::kFloat: return tf32 ? Precision::tf32 : Precision::fp32;
    default: TORCH_CHECK(false, "mlp_critic has no CUDA kernel for ", w2.scalar_type());
  }
}

// u [G, B, H1], v [G, N, H1], b2 and w [1 or G, H2], and b [1 or G] are fp32; w2 [1 or G, H2, H1] has the products'
// type. All are contiguous.
Critic critic(const Tensor& u, const Tensor& v, const Tensor& w2, const OptTensor& b2, const OptTensor& w,
              const OptTensor& b, int64_t first_row, bool softplus, bool off_diagonal, double slope) {
  constexpr int64_t most = 1 << 30;
  TORCH_CHECK(u.size(1) <= most && v.size(1) <= most && u.size(2) <= most && w2.size(1) <= most,
              "mlp_critic: B, N and hidden widths must not exceed 2^30");
  return {u.const_data_ptr<float>(),
          v.const_data_ptr<float>(),
          w2.const_data_ptr(),
          pointer_or_null<float>(b2),
          pointer_or_null<float>(w),
          pointer_or_null<float>(b),
          static_cast<int>(u.size(0)),
          static_cast<int>(u.size(1)),
          static_cast<int>(v.size(1)),
          static_cast<int>(u.size(2)),
          static_cast<int>(w2.size(1)),
          static_cast<int>(first_row),
          w2.size(0) > 1,
          softplus,
          off_diagonal,
          static_cast<float>(slope)};
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Returns positive, row_lse, col_lse, row_sum, row_softplus, clipped, scores and bits. col_lse covers the rows of the
// chunk only.
Forward forward(const Tensor& u, const Tensor& v, const Tensor& w2, const Tensor& b2, const Tensor& w, const Tensor& b,
                int64_t first_row, bool softplus, bool off_diagonal, double slope, int64_t stats, double clip,
                bool positive, bool keep, bool tf32) {
  const DeviceGuard guard(u);
  const Critic c = critic(u, v, w2, b2, w, b, first_row, softplus, off_diagonal, slope);
  const auto floats = u.options().dtype(at::kFloat);
  auto rows = [&](bool wanted) { return at::empty({c.G, wanted ? c.B : 0}, floats); };
  Tensor diagonal = rows(positive), row_sum = rows(true), row_lse = rows(stats & kRowLse),
         soft = rows(stats & kRowSoftplus), clipped = rows(stats & kClippedRowLse);
  Tensor col_lse = at::empty({c.G, stats & kColLse ? c.N : 0}, floats);
  Tensor scores = at::empty({0}, floats), bits = at::empty({0}, u.options().dtype(at::kInt));
  if (keep) {
    scores = at::empty({c.G, c.B, c.N}, floats);
    bits = at::empty({c.G, c.B, (c.H2 + 31) / 32, c.N}, bits.options());
  }
  Statistics s{pointer_or_null<float>(diagonal), pointer_or_null<float>(row_sum), pointer_or_null<float>(row_lse),
               pointer_or_null<float>(soft), pointer_or_null<float>(clipped), pointer_or_null<float>(col_lse),
               static_cast<float>(clip), pointer_or_null<float>(scores),
               keep ? reinterpret_cast<uint32_t*>(bits.mutable_data_ptr<int32_t>()) : nullptr, nullptr};
  Tensor workspace = at::empty({statistics_workspace(c, s)}, floats);
  s.workspace = pointer_or_null<float>(workspace);
  check_launch(statistics(precision_of(w2, tf32), c, s, current_stream()), "mlp_critic_forward");
  return {diagonal, row_lse, col_lse, row_sum, soft, clipped, scores, bits};
}

// dL / dS [G, B, N] of a chunk of rows. Row statistics and their gradients belong to the chunk, those of columns to all
// rows.
Tensor score_gradient(const Tensor& scores, const OptTensor& row_lse, const OptTensor& col_lse, const OptTensor& g_positive,
                      const OptTensor& g_row, const OptTensor& g_col, const OptTensor& g_sum, const OptTensor& g_soft,
                      int64_t first_row, bool softplus, bool off_diagonal) {
  const DeviceGuard guard(scores);
  Critic c{};
  c.G = static_cast<int>(scores.size(0)), c.B = static_cast<int>(scores.size(1)), c.N = static_cast<int>(scores.size(2));
  c.first_row = static_cast<int>(first_row), c.softplus = softplus, c.off_diagonal = off_diagonal;
  Tensor g = at::empty(scores.sizes(), scores.options());
  const ScoreGradients a{pointer_or_null<float>(row_lse), pointer_or_null<float>(col_lse), pointer_or_null<float>(g_positive),
                         pointer_or_null<float>(g_row),   pointer_or_null<float>(g_col),   pointer_or_null<float>(g_sum),
                         pointer_or_null<float>(g_soft),  scores.const_data_ptr<float>(),  g.mutable_data_ptr<float>()};
  check_launch(score_gradients(c, a, current_stream()), "mlp_critic_score_gradient");
  return g;
}

// du [G, B, H1] and partial sums of dv [parts, G, N, H1]. `part_bytes` bounds the size of the partial sums; there is at
// least one part.
std::tuple<Tensor, Tensor> input_gradient(const Tensor& u, const Tensor& v, const Tensor& folded, const Tensor& g,
                                          const Tensor& bits, double slope, int64_t part_bytes, bool tf32) {
  const DeviceGuard guard(u);
  const Critic c = critic(u, v, folded, {}, {}, {}, 0, false, false, slope);
  const auto floats = u.options().dtype(at::kFloat);
  const int64_t one = 4 * static_cast<int64_t>(c.G) * c.N * c.H1;
  LayerGradients a{};
  a.row_blocks = static_cast<int>(std::clamp<int64_t>(part_bytes / std::max<int64_t>(one, 1), 1, most_row_blocks(c)));
  Tensor du = at::empty({c.G, c.B, c.H1}, floats), dv = at::empty({a.row_blocks, c.G, c.N, c.H1}, floats);
  a.g = g.const_data_ptr<float>(), a.bits = reinterpret_cast<const uint32_t*>(bits.const_data_ptr<int32_t>());
  a.folded = folded.const_data_ptr();
  a.du = du.mutable_data_ptr<float>(), a.dv = dv.mutable_data_ptr<float>();
  check_launch(input_gradients(precision_of(folded, tf32), c, a, current_stream()), "mlp_critic_input_gradient");
  return {du, dv};
}

// Partial sums of P / gain [parts, G, H2, H1] and of s / gain [parts, G, H2].
std::tuple<Tensor, Tensor> weight_gradient(const Tensor& u, const Tensor& v, const Tensor& w2, const Tensor& g,
                                           const Tensor& bits, const OptTensor& gain, double slope, int64_t part_bytes,
                                           bool tf32) {
  const DeviceGuard guard(u);
  const Critic c = critic(u, v, w2, {}, {}, {}, 0, false, false, slope);
  const auto floats = u.options().dtype(at::kFloat);
  const int64_t one = 4 * static_cast<int64_t>(c.G) * c.H2 * c.H1;
  LayerGradients a{};
  a.splits = static_cast<int>(std::clamp<int64_t>(part_bytes / std::max<int64_t>(one, 1), 1, most_splits(c)));
  Tensor product = at::empty({a.splits, c.G, c.H2, c.H1}, floats), sums = at::empty({a.splits, c.G, c.H2}, floats);
  a.g = g.const_data_ptr<float>(), a.bits = reinterpret_cast<const uint32_t*>(bits.const_data_ptr<int32_t>());
  a.gain = pointer_or_null<float>(gain);
  a.product = product.mutable_data_ptr<float>(), a.sums = sums.mutable_data_ptr<float>();
  check_launch(weight_gradients(precision_of(w2, tf32), c, a, current_stream()), "mlp_critic_weight_gradient");
  return {product, sums};
}

}  // namespace
}  // namespace mk::mlp_critic

TORCH_LIBRARY_FRAGMENT(mi_kernels_cuda, m) {
  m.def(
      "mlp_critic_forward(Tensor u, Tensor v, Tensor w2, Tensor b2, Tensor w, Tensor b, int first_row, bool softplus, "
      "bool off_diagonal, float slope, int stats, float clip, bool positive, bool keep, bool tf32) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mlp_critic_score_gradient(Tensor scores, Tensor? row_lse, Tensor? col_lse, Tensor? g_positive, Tensor? g_row, "
      "Tensor? g_col, Tensor? g_sum, Tensor? g_soft, int first_row, bool softplus, bool off_diagonal) -> Tensor");
  m.def(
      "mlp_critic_input_gradient(Tensor u, Tensor v, Tensor folded, Tensor g, Tensor bits, float slope, "
      "int part_bytes, bool tf32) -> (Tensor, Tensor)");
  m.def(
      "mlp_critic_weight_gradient(Tensor u, Tensor v, Tensor w2, Tensor g, Tensor bits, Tensor? gain, float slope, "
      "int part_bytes, bool tf32) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(mi_kernels_cuda, MK_CUDA_KEY, m) {
  m.impl("mlp_critic_forward", &mk::mlp_critic::forward);
  m.impl("mlp_critic_score_gradient", &mk::mlp_critic::score_gradient);
  m.impl("mlp_critic_input_gradient", &mk::mlp_critic::input_gradient);
  m.impl("mlp_critic_weight_gradient", &mk::mlp_critic::weight_gradient);
}

#endif  // MI_KERNELS_WITH_CUDA
