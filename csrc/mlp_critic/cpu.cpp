// The MLP critic's CPU operators. Python has checked the shapes; inputs are converted to the accumulation type here.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <iterator>
#include <vector>

#include "problem.h"

namespace mk::mlp_critic {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

Act activation_of(c10::string_view name) {
  for (size_t k = 0; k < std::size(kActivations); ++k)
    if (name == kActivations[k]) return static_cast<Act>(k);
  TORCH_CHECK_VALUE(false, "mlp_critic has no activation '", name, "'");
}

// Inputs in the accumulation type. The weights' type determines the precision of the products; u and v may be wider.
struct Call {
  Tensor u, v;
  std::vector<Tensor> parameters;  // [w2, b2,] w, b
  at::ScalarType type;
  bool low, own_weights, two_layers;
  Act act;
  bool softplus_output, off_diagonal;

  Call(const Tensor& u_, const Tensor& v_, at::TensorList weights, at::TensorList biases, c10::string_view activation,
       c10::string_view output, bool off)
      : act(activation_of(activation)), softplus_output(output == kOutputs[1]), off_diagonal(off) {
    TORCH_CHECK_VALUE(weights.size() == biases.size() && (weights.size() == 1 || weights.size() == 2),
                      "mlp_critic on a CPU takes one or two hidden layers, got ", weights.size());
    const auto input = weights[0].scalar_type();
    type = input == at::kDouble ? at::kDouble : at::kFloat;
    const bool medium = input == at::kFloat &&
                        at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::MEDIUM;
    low = (input == at::kBFloat16 || medium) && has_brgemm_bf16();
    two_layers = weights.size() == 2;
    const int64_t G = u_.size(0);
    own_weights = false;
    for (const auto& list : {weights, biases})
      for (const Tensor& p : list) own_weights = own_weights || p.size(0) != 1;
    auto cast = [&](const Tensor& t) { return t.to(type).contiguous(); };
    auto expand = [&](const Tensor& t) {
      if (!own_weights || t.size(0) == G) return cast(t);
      auto shape = t.sizes().vec();
      shape[0] = G;
      return cast(t.expand(shape));
    };
    u = cast(u_), v = cast(v_);
    for (size_t k = 0; k < weights.size(); ++k) parameters.push_back(expand(weights[k])), parameters.push_back(expand(biases[k]));
  }

  template <class T>
  Inputs<T> inputs() const {
    auto data = [&](size_t from_end) { return parameters[parameters.size() - from_end].const_data_ptr<T>(); };
    return {u.size(0), u.size(1), v.size(1), u.size(2), two_layers ? parameters[0].size(1) : 0, u.const_data_ptr<T>(),
            v.const_data_ptr<T>(), two_layers ? data(4) : nullptr, two_layers ? data(3) : nullptr, data(2), data(1),
            own_weights, act, softplus_output, off_diagonal};
  }

  // Calls f.template operator()<T, E>() with the accumulation type T and the type E of the products' operands.
  template <class F>
  void with_types(F&& f) const {
    if (type == at::kDouble) {
      f.template operator()<double, double>();
    } else if (low && two_layers) {
      f.template operator()<float, c10::BFloat16>();
    } else {
      f.template operator()<float, float>();
    }
  }
};

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward forward(const Tensor& u, const Tensor& v, at::TensorList weights, at::TensorList biases,
                c10::string_view activation, c10::string_view output, bool off_diagonal, int64_t stats, double clip,
                bool keep) {
  const Call call(u, v, weights, biases, activation, output, off_diagonal);
  const int64_t G = u.size(0), B = u.size(1), N = v.size(1);
  const auto options = call.u.options();
  auto rows = [&](bool wanted) { return at::empty({G, wanted ? B : 0}, options); };
  Tensor positive = rows(B == N), row_lse = rows(stats & kRowLse), row_sum = rows(true),
         softplus = rows(stats & kRowSoftplus), clipped = rows(stats & kClippedRowLse);
  Tensor col_lse = at::empty({G, stats & kColLse ? N : 0}, options);
  Tensor kept_scores = at::empty({0}, options), kept_masks = at::empty({0}, options.dtype(at::kInt));
  call.with_types([&]<class T, class E>() {
    Problem<T, E> problem(call.inputs<T>());
    if (keep) {
      kept_scores = at::empty({G, problem.row_tiles, problem.column_tiles, problem.t.P}, options);
      const int64_t words = ceil_div(problem.in.H2, 32);
      kept_masks = at::empty({G, problem.row_tiles, problem.column_tiles, words, problem.t.P}, kept_masks.options());
    }
    auto data = [](Tensor& t) { return t.numel() ? t.mutable_data_ptr<T>() : nullptr; };
    problem.forward({data(positive), data(row_lse), data(col_lse), data(row_sum), data(softplus), data(clipped),
                     static_cast<T>(clip)},
                    data(kept_scores),
                    keep ? reinterpret_cast<uint32_t*>(kept_masks.mutable_data_ptr<int32_t>()) : nullptr);
  });
  return {positive, row_lse, col_lse, row_sum, softplus, clipped, kept_scores, kept_masks};
}

std::vector<Tensor> backward(const Tensor& u, const Tensor& v, at::TensorList weights, at::TensorList biases,
                             c10::string_view activation, c10::string_view output, bool off_diagonal,
                             const Tensor& row_lse, const Tensor& col_lse, const OptTensor& g_positive,
                             const OptTensor& g_row, const OptTensor& g_col, const OptTensor& g_sum,
                             const OptTensor& g_soft, const Tensor& kept_scores, const Tensor& kept_masks,
                             bool need_parameters) {
  const Call call(u, v, weights, biases, activation, output, off_diagonal);
  std::vector<Tensor> given{row_lse.contiguous(), col_lse.contiguous()};
  for (const auto& g : {g_positive, g_row, g_col, g_sum, g_soft})
    given.push_back(g ? g->to(call.type).contiguous() : at::empty({0}, call.u.options()));
  std::vector<Tensor> out{at::empty_like(call.u), at::empty_like(call.v)};
  for (size_t k = 0; need_parameters && k < call.parameters.size(); ++k) out.push_back(at::empty_like(call.parameters[k]));
  call.with_types([&]<class T, class E>() {
    auto data = [](const Tensor& t) { return t.numel() ? t.const_data_ptr<T>() : nullptr; };
    auto at_end = [&](size_t from_end) { return out[out.size() - from_end].template mutable_data_ptr<T>(); };
    Gradients<T> gradients{out[0].mutable_data_ptr<T>(), out[1].mutable_data_ptr<T>()};
    if (need_parameters) {
      gradients.w = at_end(2), gradients.b = at_end(1);
      if (call.two_layers) gradients.w2 = at_end(4), gradients.b2 = at_end(3);
    }
    const Weights<T> flowing{data(given[2]), data(given[3]), data(given[4]), data(given[5]), data(given[6]),
                             data(given[0]), data(given[1])};
    Problem<T, E>(call.inputs<T>())
        .backward(flowing, data(kept_scores),
                  kept_masks.numel() ? reinterpret_cast<const uint32_t*>(kept_masks.const_data_ptr<int32_t>()) : nullptr,
                  gradients);
  });
  // Convert the gradients to the inputs' types and order (u, v, weights, biases); sum those of shared parameters.
  std::vector<Tensor> result{out[0].to(u.scalar_type()), out[1].to(v.scalar_type())};
  if (!need_parameters) return result;
  for (size_t offset : {0, 1})
    for (size_t k = 0; k < weights.size(); ++k) {
      const Tensor& like = offset ? biases[k] : weights[k];
      Tensor d = out[2 + 2 * k + offset];
      if (d.size(0) != like.size(0)) d = d.sum(0, true);
      result.push_back(d.to(like.scalar_type()));
    }
  return result;
}

}  // namespace
}  // namespace mk::mlp_critic

TORCH_LIBRARY_IMPL(mi_kernels_cpu, CPU, m) {
  m.impl("mlp_critic_forward", &mk::mlp_critic::forward);
  m.impl("mlp_critic_backward", &mk::mlp_critic::backward);
}
