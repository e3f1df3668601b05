// The LSTM scan's operators on CUDA tensors (with the emulator: on CPU tensors). Python has validated the inputs.
#ifdef MI_KERNELS_WITH_CUDA

#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "../common/cuda/torch.h"
#include "launch.cuh"
#include "schema.h"

namespace mk::lstm_scan {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

Tensor floats(const Tensor& t) { return t.to(at::kFloat).contiguous(); }
OptTensor floats(const OptTensor& t) { return t ? OptTensor(floats(*t)) : t; }
const int64_t* values(const OptTensor& lengths) { return lengths ? lengths->const_data_ptr<int64_t>() : nullptr; }

Sizes sizes_of(at::IntArrayRef states, const Tensor& like, int64_t processors) {
  TORCH_CHECK(like.scalar_type() != at::kDouble, "lstm_scan has no CUDA kernel for fp64");
  constexpr int64_t most = 1 << 30;
  TORCH_CHECK(states[0] * states[1] <= most && states[2] <= most && states[3] <= most / 4,
              "lstm_scan: G B and T must not exceed 2^30, H not 2^28");
  return {static_cast<int>(states[0]), static_cast<int>(states[1]), static_cast<int>(states[2]),
          static_cast<int>(states[3]), static_cast<int>(processors)};
}

// W [G, 4H, H] with the four gates of a unit side by side: [G, H (unit), H (k), 4].
Tensor by_unit(const Tensor& weight) {
  const int64_t H = weight.size(2);
  return weight.to(at::kFloat).view({weight.size(0), 4, H, H}).permute({0, 2, 3, 1});
}

std::tuple<Tensor, Tensor, Tensor> run_forward(const Tensor& gates, const Tensor& weight, const OptTensor& bias,
                                               const OptTensor& h0, const OptTensor& c0, const OptTensor& lengths,
                                               int64_t steps, bool keep, int64_t processors) {
  const DeviceGuard guard(gates);
  const Sizes z = sizes_of({gates.size(0), gates.size(1), steps, weight.size(2)}, gates, processors);
  const Tensor x = floats(gates), w = by_unit(weight).transpose(1, 2).contiguous();
  const OptTensor b = floats(bias), h_first = floats(h0), c_first = floats(c0);
  Tensor h = at::empty({z.G, z.B, z.T, z.H}, x.options()), c = at::empty({z.G, z.B, z.T, z.H}, x.options());
  Tensor activations = keep ? at::empty({z.G, z.B, z.T, 4 * z.H}, x.options()) : at::empty({0}, x.options());
  const Forward f{x.const_data_ptr<float>(),
                  w.const_data_ptr<float>(),
                  pointer_or_null<float>(b),
                  pointer_or_null<float>(h_first),
                  pointer_or_null<float>(c_first),
                  values(lengths),
                  static_cast<int>(gates.size(2)),
                  h.mutable_data_ptr<float>(),
                  c.mutable_data_ptr<float>(),
                  pointer_or_null<float>(activations)};
  check_launch(forward(z, f, current_stream()), "lstm_scan_forward");
  return {h, c, activations};
}

// The sum over rows and steps of d h_before^T, as one matmul.
Tensor weight_gradient(const Tensor& d, const Tensor& h, const OptTensor& h0) {
  Tensor first = h0 ? floats(*h0) : at::zeros({h.size(0), h.size(1), h.size(3)}, h.options());
  const Tensor before = at::cat({first.unsqueeze(2), h.narrow(2, 0, h.size(2) - 1)}, 2);
  return at::bmm(d.flatten(1, 2).transpose(1, 2), before.flatten(1, 2));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_backward(
    const Tensor& weight, const OptTensor& h0, const OptTensor& c0, const OptTensor& lengths, const Tensor& h,
    const Tensor& c, const Tensor& activations, const OptTensor& g_h, const OptTensor& g_c, int64_t inputs,
    int64_t needs, int64_t processors) {
  const DeviceGuard guard(h);
  const Sizes z = sizes_of(h.sizes(), h, processors);
  const Tensor w = by_unit(weight).contiguous();
  const OptTensor c_first = floats(c0), slope_h = floats(g_h), slope_c = floats(g_c);
  auto wanted = [&](int64_t bit) {
    return needs & bit ? at::empty({z.G, z.B, z.H}, h.options()) : at::empty({0}, h.options());
  };
  Tensor d = at::empty({z.G, z.B, z.T, 4 * z.H}, h.options()), dh0 = wanted(kNeedH0), dc0 = wanted(kNeedC0);
  const Backward b{w.const_data_ptr<float>(),
                   pointer_or_null<float>(c_first),
                   c.const_data_ptr<float>(),
                   activations.const_data_ptr<float>(),
                   pointer_or_null<float>(slope_h),
                   pointer_or_null<float>(slope_c),
                   values(lengths),
                   d.mutable_data_ptr<float>(),
                   pointer_or_null<float>(dh0),
                   pointer_or_null<float>(dc0)};
  check_launch(backward(z, b, current_stream()), "lstm_scan_backward");
  const Tensor none = at::empty({0}, h.options());
  return {inputs < z.T ? d.narrow(2, 0, inputs).contiguous() : d, needs & kNeedWeight ? weight_gradient(d, h, h0) : none,
          needs & kNeedBias ? d.sum({1, 2}) : none.clone(), dh0, dc0};
}

}  // namespace
}  // namespace mk::lstm_scan

TORCH_LIBRARY_FRAGMENT(mi_kernels_cuda, m) {
  m.def(
      "lstm_scan_forward(Tensor gates, Tensor weight, Tensor? bias, Tensor? h0, Tensor? c0, Tensor? lengths, "
      "int steps, bool keep, int processors) -> (Tensor, Tensor, Tensor)");
  m.def(
      "lstm_scan_backward(Tensor weight, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor h, Tensor c, "
      "Tensor activations, Tensor? g_h, Tensor? g_c, int inputs, int needs, int processors) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(mi_kernels_cuda, MK_CUDA_KEY, m) {
  m.impl("lstm_scan_forward", &mk::lstm_scan::run_forward);
  m.impl("lstm_scan_backward", &mk::lstm_scan::run_backward);
}

#endif  // MI_KERNELS_WITH_CUDA
