// The dot critic's operators on CUDA tensors (with the emulator: on CPU tensors). Python has validated the inputs.
#ifdef MI_KERNELS_WITH_CUDA

#include <ATen/ops/abs.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "../common/cuda/torch.h"
#include "launch.cuh"
#include "schema.h"

namespace mk::dot_critic {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

Precision precision_of(const Tensor& x, bool tf32) {
  switch (x.scalar_type()) {
    case at::kBFloat16: return Precision::bf16;
    case at::kHalf: return Precision::fp16;
    case at::kFloat: return tf32 ? Precision::tf32 : Precision::fp32;
    default: TORCH_CHECK(false, "dot_critic has no CUDA kernel for ", x.scalar_type());
  }
}

// The inputs, contiguous and in the kernels' types. Holds the copies that this takes.
struct Inputs {
  Tensor x, y, scale;
  OptTensor row_bias, col_bias, row_ids, col_ids;
  int64_t pairs, shift;

  static OptTensor vector(const OptTensor& t, at::ScalarType type) {
    return t ? OptTensor(t->to(type).contiguous()) : OptTensor();
  }
  Problem problem() const {
    constexpr int64_t most = 1 << 30;
    TORCH_CHECK(x.size(1) <= most && y.size(1) <= most && x.size(2) <= most, "dot_critic: B, N and D must not exceed 2^30");
    return {x.const_data_ptr(),
            y.const_data_ptr(),
            scale.const_data_ptr<float>(),
            pointer_or_null<float>(row_bias),
            pointer_or_null<float>(col_bias),
            pointer_or_null<int64_t>(row_ids),
            pointer_or_null<int64_t>(col_ids),
            static_cast<int>(x.size(0)),
            static_cast<int>(x.size(1)),
            static_cast<int>(y.size(1)),
            static_cast<int>(x.size(2)),
            static_cast<int>(pairs),
            shift < 0 || y.size(1) == 0 ? -1 : static_cast<int>(shift % y.size(1))};
  }
};

Inputs inputs(MK_DOT_PROBLEM_PARAMETERS) {
  return {x.contiguous(),
          y.contiguous(),
          scale.to(at::kFloat).contiguous(),
          Inputs::vector(row_bias, at::kFloat),
          Inputs::vector(col_bias, at::kFloat),
          Inputs::vector(row_ids, at::kLong),
          Inputs::vector(col_ids, at::kLong),
          pairs,
          shift};
}

Tensor empty(bool wanted, at::IntArrayRef shape, at::TensorOptions options) {
  return at::empty(wanted ? shape : at::IntArrayRef{0}, options);
}

std::tuple<Tensor, Tensor, Tensor> stats(MK_DOT_PROBLEM_PARAMETERS, int64_t wanted, double clip, bool tf32) {
  const DeviceGuard guard(x);
  const Inputs in = inputs(MK_DOT_PROBLEM);
  const Problem p = in.problem();
  const auto floats = x.options().dtype(at::kFloat);
  Tensor row = empty(wanted & kRowLse, {p.G, p.B}, floats), col = empty(wanted & kColLse, {p.G, p.N}, floats),
         soft = empty(wanted & kSoftplus, {p.G, p.B}, floats);
  Statistics s{pointer_or_null<float>(row), pointer_or_null<float>(col), pointer_or_null<float>(soft),
               (wanted & kSigned) && shift >= 0, static_cast<float>(clip), nullptr};
  Tensor workspace = at::empty({statistics_workspace(p, s)}, floats);
  s.workspace = pointer_or_null<float>(workspace);
  if (s.workspace) check_launch(statistics(precision_of(x, tf32), p, s, current_stream()), "dot_critic_stats");
  return {row, col, soft};
}

// A power of two near the largest weight, computed on the device. dS is linear in the weights; divided by this gain,
// its entries have the size of probabilities, which fp16 can represent.
Tensor gain_of(std::initializer_list<OptTensor> weights, const Tensor& like) {
  Tensor largest = at::zeros({}, like.options().dtype(at::kFloat));
  for (const OptTensor& w : weights)
    if (w) largest = at::maximum(largest, w->abs().amax());
  return at::where(largest.gt(0), largest.log2().ceil().exp2(), at::ones_like(largest)).contiguous();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> grad(
    MK_DOT_PROBLEM_PARAMETERS, MK_DOT_SLOPES_PARAMETERS, int64_t needs, bool tf32) {
  const DeviceGuard guard(x);
  const Inputs in = inputs(MK_DOT_PROBLEM);
  const Problem p = in.problem();
  const auto floats = x.options().dtype(at::kFloat);
  auto vector = [](const OptTensor& t) { return Inputs::vector(t, at::kFloat); };
  const OptTensor lse_r = vector(row_lse), lse_c = vector(col_lse), gr = vector(g_row), gc = vector(g_col),
                  gs = vector(g_soft), gp = vector(shift >= 0 ? g_pos : OptTensor());
  OptTensor gain;
  if (x.scalar_type() == at::kHalf) gain = gain_of({gr, gc, gs, gp}, x);
  Tensor dx = empty(needs & kNeedX, x.sizes(), floats), dy = empty(needs & kNeedY, y.sizes(), floats),
         row = empty(needs & kNeedRowBias, {p.G, p.B}, floats), col = empty(needs & kNeedColBias, {p.G, p.N}, floats),
         scale_rows = empty(needs & kNeedScale, {p.G, p.B}, floats);
  const Gradients g{gr ? pointer_or_null<float>(lse_r) : nullptr,
                    gc ? pointer_or_null<float>(lse_c) : nullptr,
                    pointer_or_null<float>(gr),
                    pointer_or_null<float>(gc),
                    pointer_or_null<float>(gs),
                    pointer_or_null<float>(gp),
                    soft_signed && gs && shift >= 0,
                    pointer_or_null<float>(gain),
                    pointer_or_null<float>(dx),
                    pointer_or_null<float>(dy),
                    pointer_or_null<float>(row),
                    pointer_or_null<float>(col),
                    pointer_or_null<float>(scale_rows)};
  check_launch(gradients(precision_of(x, tf32), p, g, current_stream()), "dot_critic_grad");
  return {dx, dy, needs & kNeedScale ? scale_rows.sum(1) : scale_rows, row, col};
}

}  // namespace
}  // namespace mk::dot_critic

TORCH_LIBRARY_FRAGMENT(mi_kernels_cuda, m) {
  m.def("dot_critic_stats(" MK_DOT_PROBLEM_SCHEMA ", int stats, float clip, bool tf32) -> (Tensor, Tensor, Tensor)");
  m.def("dot_critic_grad(" MK_DOT_PROBLEM_SCHEMA ", " MK_DOT_SLOPES_SCHEMA
        ", int needs, bool tf32) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(mi_kernels_cuda, MK_CUDA_KEY, m) {
  m.impl("dot_critic_stats", &mk::dot_critic::stats);
  m.impl("dot_critic_grad", &mk::dot_critic::grad);
}

#endif  // MI_KERNELS_WITH_CUDA
