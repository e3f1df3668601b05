// The dot critic's CPU operators: statistics, their gradient, and losses with their gradients in one call.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <tuple>

#include "problem.h"

namespace mk::dot_critic {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

template <class T>
const T* group_of(const OptTensor& t, int64_t group, int64_t length) {
  return t ? t->const_data_ptr<T>() + group * length : nullptr;
}
template <class T>
T* group_of(Tensor& t, int64_t group, int64_t length) {
  return t.numel() ? t.mutable_data_ptr<T>() + group * length : nullptr;
}

// Inputs converted to the accumulation type, and whether tiles are multiplied in bf16 (`low`).
struct Call {
  Tensor x, y, scale;
  OptTensor row_bias, col_bias, row_ids, col_ids;
  int64_t pairs, shift, G, B, N, D;
  at::ScalarType type;
  bool low;

  Call(const Tensor& x_, const Tensor& y_, const Tensor& scale_, const OptTensor& a, const OptTensor& b,
       const OptTensor& row_ids_, const OptTensor& col_ids_, int64_t pairs_, int64_t shift_)
      : row_ids(row_ids_), col_ids(col_ids_), pairs(pairs_), shift(shift_) {
    G = x_.size(0), B = x_.size(1), D = x_.size(2), N = y_.size(1);
    const at::ScalarType input_type = x_.scalar_type();
    type = input_type == at::kDouble ? at::kDouble : at::kFloat;
    const bool medium = input_type == at::kFloat &&
                        at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::MEDIUM;
    low = (input_type == at::kBFloat16 || medium) && has_brgemm_bf16();
    auto cast = [&](const Tensor& t) { return t.to(type).contiguous(); };
    x = cast(x_), y = cast(y_), scale = cast(scale_);
    if (a) row_bias = cast(*a);
    if (b) col_bias = cast(*b);
  }

  template <class T>
  Group<T> group(int64_t i) const {
    return {B, N, D, x.const_data_ptr<T>() + i * B * D, y.const_data_ptr<T>() + i * N * D, scale.const_data_ptr<T>()[i],
            group_of<T>(row_bias, i, B), group_of<T>(col_bias, i, N), group_of<int64_t>(row_ids, i, B),
            group_of<int64_t>(col_ids, i, N), pairs, shift};
  }

  Tensor empty(bool wanted, at::IntArrayRef shape) const {
    return at::empty(wanted ? shape : at::IntArrayRef{0}, x.options());
  }

  // Calls f.template operator()<T, E>(group, threads) for each group. Many small groups run in parallel, one thread
  // each; a few large groups run one after the other, each on all threads.
  template <class F>
  void each_group(F&& f) const {
    const int64_t available = at::in_parallel_region() ? 1 : at::get_num_threads();
    const double flops = 2.0 * B * N * D;
    auto one = [&](int64_t i, int64_t threads) {
      if (type == at::kDouble) {
        f.template operator()<double, double>(i, threads);
      } else if (low) {
        f.template operator()<float, c10::BFloat16>(i, threads);
      } else {
        f.template operator()<float, float>(i, threads);
      }
    };
    if (G >= available && G > 1 && available > 1 && flops * G > 1e6) {
      at::parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) one(i, 1);
      });
    } else {
      for (int64_t i = 0; i < G; ++i) one(i, flops > 1.5e6 ? available : 1);
    }
  }
};

// Normalised rows of x and y, and 1 / norm of each row for the backward pass. They are buffers, not tensors: only this
// call needs them, and the next call reuses the memory.
template <class T>
struct Units {
  Buffer<T> x, y, x_inverse, y_inverse;

  explicit Units(const Call& c)
      : x(make_buffer<T>(c.x.numel())), y(make_buffer<T>(c.y.numel())),
        x_inverse(make_buffer<T>(c.G * c.B)), y_inverse(make_buffer<T>(c.G * c.N)) {
    const T *x_in = c.x.const_data_ptr<T>(), *y_in = c.y.const_data_ptr<T>();
    const int64_t depth = c.D, x_rows = c.G * c.B, y_rows = c.G * c.N;
    auto share = [depth](const T* in, T* out, T* inverse, int64_t begin, int64_t end) {
      if (begin < end) rows::normalize(end - begin, depth, in + begin * depth, out + begin * depth, inverse + begin);
    };
    at::parallel_for(0, x_rows + y_rows, std::max<int64_t>(1, (1 << 15) / depth), [&](int64_t begin, int64_t end) {
      share(x_in, x.get(), x_inverse.get(), std::min(begin, x_rows), std::min(end, x_rows));
      share(y_in, y.get(), y_inverse.get(), std::max(begin, x_rows) - x_rows, std::max(end, x_rows) - x_rows);
    });
  }

  // Makes group i use the normalised rows; its gradients are still those of the original rows.
  void enter(const Call& c, int64_t i, Group<T>& group, Gradients<T>& gradients) const {
    group.x = x.get() + i * c.B * c.D, group.y = y.get() + i * c.N * c.D;
    gradients.x_inverse = x_inverse.get() + i * c.B, gradients.y_inverse = y_inverse.get() + i * c.N;
  }
};

// `Units` in the call's accumulation type, or none if the rows are not to be normalised.
struct AnyUnits {
  std::tuple<std::optional<Units<float>>, std::optional<Units<double>>> units;

  AnyUnits(const Call& c, bool wanted) {
    if (wanted && c.type == at::kDouble) std::get<1>(units).emplace(c);
    if (wanted && c.type != at::kDouble) std::get<0>(units).emplace(c);
  }
  template <class T>
  void enter(const Call& c, int64_t i, Group<T>& group, Gradients<T>& gradients) const {
    if (const auto& own = std::get<std::optional<Units<T>>>(units)) own->enter(c, i, group, gradients);
  }
};

template <class T, class To>
void to_lse(int64_t n, const T* top, const T* sum, To* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = sum[i] == T(0) ? minus_infinity<To>() : To(top[i]) + std::log(static_cast<To>(sum[i]));
}

// The rounding error of lse, the log-sum-exp of (top, sum), as a factor that corrects exp(S - lse). For scores of 1000
// it differs from 1 by 1e-4.
template <class T>
void rounding_factors(int64_t n, const T* top, const T* sum, const T* lse, T* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = sum[i] == T(0)
                 ? T(0)
                 : static_cast<T>(std::exp((static_cast<double>(lse[i]) - top[i]) - std::log(static_cast<double>(sum[i]))));
}

std::tuple<Tensor, Tensor, Tensor> stats(MK_DOT_PROBLEM_PARAMETERS, int64_t wanted, double clip) {
  const Call c(MK_DOT_PROBLEM);
  auto lse = [&](bool wanted, int64_t n) {
    return at::empty(wanted ? std::vector<int64_t>{c.G, n} : std::vector<int64_t>{0}, c.x.options().dtype(at::kDouble));
  };
  Tensor row = lse(wanted & kRowLse, c.B), col = lse(wanted & kColLse, c.N),
         soft = c.empty(wanted & kSoftplus, {c.G, c.B});
  c.each_group([&]<class T, class E>(int64_t i, int64_t threads) {
    Problem<T, E> problem(c.group<T>(i), threads, 0);
    std::vector<T> row_top(c.B), row_sum(c.B), col_top(c.N), col_sum(c.N);
    double *r = group_of<double>(row, i, c.B), *k = group_of<double>(col, i, c.N);
    problem.statistics(r ? row_top.data() : nullptr, row_sum.data(), k ? col_top.data() : nullptr, col_sum.data(),
                       group_of<T>(soft, i, c.B), wanted & kSigned, static_cast<T>(clip), nullptr, nullptr);
    if (r) to_lse(c.B, row_top.data(), row_sum.data(), r);
    if (k) to_lse(c.N, col_top.data(), col_sum.data(), k);
  });
  return {row, col, soft};
}

struct Outputs {  // gradients, all in the accumulation type
  Tensor x, y, scale, row_bias, col_bias;
  Outputs(const Call& c, int64_t needs)
      : x(c.empty(needs & kNeedX, {c.G, c.B, c.D})),
        y(c.empty(needs & kNeedY, {c.G, c.N, c.D})),
        scale(c.empty(needs & kNeedScale, {c.G})),
        row_bias(c.empty(needs & kNeedRowBias, {c.G, c.B})),
        col_bias(c.empty(needs & kNeedColBias, {c.G, c.N})) {}
  template <class T>
  Gradients<T> group(const Call& c, int64_t i) {
    return {group_of<T>(x, i, c.B * c.D), group_of<T>(y, i, c.N * c.D), group_of<T>(scale, i, 1),
            group_of<T>(row_bias, i, c.B), group_of<T>(col_bias, i, c.N)};
  }
};

// A group's log-sum-exps rounded to T, and the gradients of the loss with respect to them. The error of rounding fp64
// log-sum-exps to T is corrected by a factor in these gradients.
template <class T>
struct Known {
  std::vector<T> rounded, corrected;
  const T *lse = nullptr, *g = nullptr;

  Known(const OptTensor& exact, const OptTensor& slopes, int64_t i, int64_t n) {
    if (!exact || !slopes) return;
    g = group_of<T>(slopes, i, n);
    if (exact->scalar_type() == c10::CppTypeToScalarType<T>::value) {
      lse = group_of<T>(exact, i, n);
      return;
    }
    const double* const from = group_of<double>(exact, i, n);
    rounded.resize(n), corrected.resize(n);
    for (int64_t k = 0; k < n; ++k) {
      rounded[k] = static_cast<T>(from[k]);
      const double off = rounded[k] - from[k];  // NaN if the row has no pairs (both are -inf); it has no gradient then
      corrected[k] = off == off ? static_cast<T>(g[k] * std::exp(off)) : g[k];
    }
    lse = rounded.data(), g = corrected.data();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> grad(
    MK_DOT_PROBLEM_PARAMETERS, MK_DOT_SLOPES_PARAMETERS, int64_t needs) {
  const Call c(MK_DOT_PROBLEM);
  Outputs out(c, needs);
  c.each_group([&]<class T, class E>(int64_t i, int64_t threads) {
    Problem<T, E> problem(c.group<T>(i), threads, needs);
    const Known<T> row(row_lse, g_row, i, c.B), col(col_lse, g_col, i, c.N);
    const Weights<T> weights{row.lse, row.g, col.lse, col.g, group_of<T>(g_soft, i, c.B), group_of<T>(g_pos, i, c.B),
                             soft_signed};
    problem.gradient(weights, out.group<T>(c, i), nullptr, nullptr, nullptr);
  });
  return {out.x, out.y, out.scale, out.row_bias, out.col_bias};
}

// Recomputing a panel that exceeds the last-level cache costs less than reading it back from memory.
constexpr int64_t kPanelLimit = 16 << 20;
// Scores of at most this size are always kept between the two passes, regardless of the caller's budget.
constexpr int64_t kAlwaysKept = 16 << 20;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> loss(
    MK_DOT_PROBLEM_PARAMETERS, double w_row, double w_col,
    double w_soft, double w_pos, bool soft_signed, bool normalize, int64_t needs, int64_t budget) {
  const Call c(MK_DOT_PROBLEM);
  const AnyUnits units(c, normalize);
  Outputs out(c, needs);
  Tensor value = at::empty({c.G}, c.x.options());
  c.each_group([&]<class T, class E>(int64_t i, int64_t threads) {
    Group<T> group = c.group<T>(i);
    Gradients<T> gradients = out.group<T>(c, i);
    units.enter(c, i, group, gradients);
    Problem<T, E> problem(group, threads, needs);
    T* result = value.mutable_data_ptr<T>() + i;
    if (w_row != 0 && w_col == 0 && w_soft == 0 && needs && problem.panel_bytes() <= kPanelLimit) {
      *result = static_cast<T>(problem.row_loss(static_cast<T>(w_row), static_cast<T>(w_pos), gradients));
      return;
    }
    std::vector<T> row_top(c.B), row_sum(c.B), col_top(c.N), col_sum(c.N), soft(c.B), positive(c.B);
    std::vector<T> g_row(c.B), g_col(c.N), g_soft(c.B, T(w_soft)), g_pos(c.B, T(-w_pos));
    Weights<T> weights;
    weights.soft_signed = soft_signed;
    if (w_soft != 0) weights.g_soft = g_soft.data();
    if (w_pos != 0) weights.g_pos = g_pos.data();
    T* positives = shift >= 0 ? positive.data() : nullptr;
    Tensor kept;  // a tensor, because the next call reuses its memory; a buffer of this size would page-fault again
    T* stored = nullptr;
    std::vector<T> row_lse(c.B), col_lse(c.N);
    const bool lse = w_row != 0 || w_col != 0;
    if (lse) {
      if (needs && problem.stored_elements() * static_cast<int64_t>(sizeof(T)) <= std::max(budget, kAlwaysKept) / c.G)
        kept = at::empty({problem.stored_elements()}, c.x.options()), stored = kept.mutable_data_ptr<T>();
      problem.statistics(w_row != 0 ? row_top.data() : nullptr, row_sum.data(), w_col != 0 ? col_top.data() : nullptr,
                         col_sum.data(), nullptr, false, kUnclipped<T>, stored, positives);
      to_lse(c.B, row_top.data(), row_sum.data(), row_lse.data());
      to_lse(c.N, col_top.data(), col_sum.data(), col_lse.data());
      if (w_row != 0) {
        rounding_factors(c.B, row_top.data(), row_sum.data(), row_lse.data(), g_row.data());
        for (T& g : g_row) g *= T(w_row);
        weights.row_lse = row_lse.data(), weights.g_row = g_row.data();
      }
      if (w_col != 0) {
        rounding_factors(c.N, col_top.data(), col_sum.data(), col_lse.data(), g_col.data());
        for (T& g : g_col) g *= T(w_col);
        weights.col_lse = col_lse.data(), weights.g_col = g_col.data();
      }
    }
    if (needs) {
      problem.gradient(weights, gradients, w_soft != 0 ? soft.data() : nullptr, stored, lse ? nullptr : positives);
    } else if (w_soft != 0) {
      problem.statistics(nullptr, nullptr, nullptr, nullptr, soft.data(), soft_signed, kUnclipped<T>, nullptr,
                         lse ? nullptr : positives);
    }
    // Once a critic is trained, a log-sum-exp and its positive score nearly cancel. Subtracting the positive score from
    // the maximum before adding the logarithm keeps the digits.
    double total = 0, left = w_pos;
    if (w_row != 0) {
      const double share = positives ? std::min(w_row, left) : 0;
      left -= share;
      for (int64_t k = 0; k < c.B; ++k)
        total += w_row * std::log(static_cast<double>(row_sum[k])) + (w_row - share) * row_top[k] +
                 (share ? share * (static_cast<double>(row_top[k]) - positive[k]) : 0.0);
    }
    if (w_col != 0) {
      const bool paired = positives && c.B == c.N && left > 0;
      const double share = paired ? std::min(w_col, left) : 0;
      left -= share;
      for (int64_t k = 0; k < c.N; ++k)
        total += w_col * std::log(static_cast<double>(col_sum[k])) + (w_col - share) * col_top[k];
      if (paired)
        for (int64_t k = 0; k < c.B; ++k) total += share * (static_cast<double>(col_top[(k + shift) % c.N]) - positive[k]);
    }
    if (w_soft != 0)
      for (int64_t k = 0; k < c.B; ++k) total += w_soft * soft[k];
    if (positives && left != 0)
      for (int64_t k = 0; k < c.B; ++k) total -= left * positive[k];
    *result = static_cast<T>(total);
  });
  return {value, out.x, out.y, out.scale, out.row_bias, out.col_bias};
}

// Per-row losses row_lse_i - S_i,pos(i) (symmetric: the mean of this and the column's loss), and what their gradient
// needs: the log-sum-exp and its rounding factor per row and per column, [G, 2, .], and the scores if they are small
// enough to be kept. The shape of the kept scores tells how they are tiled, which the gradient checks.
std::tuple<Tensor, Tensor, Tensor, Tensor> row_losses(
    MK_DOT_PROBLEM_PARAMETERS, bool symmetric, bool normalize,
    bool keep) {
  const Call c(MK_DOT_PROBLEM);
  const AnyUnits units(c, normalize);
  Tensor losses = c.empty(true, {c.G, c.B}), row = c.empty(true, {c.G, 2, c.B}), col = c.empty(symmetric, {c.G, 2, c.N}),
         scores = c.empty(false, {});
  std::once_flag allocated;
  c.each_group([&]<class T, class E>(int64_t i, int64_t threads) {
    Group<T> group = c.group<T>(i);
    Gradients<T> none;
    units.enter(c, i, group, none);
    Problem<T, E> problem(group, threads, 0);
    const auto order = problem.stored_shape();
    if (keep && problem.stored_elements() * static_cast<int64_t>(sizeof(T)) <= kAlwaysKept / c.G)
      std::call_once(allocated, [&] { scores = at::empty({c.G, order[0], order[1], order[2], order[3]}, c.x.options()); });
    std::vector<T> row_top(c.B), row_sum(c.B), col_top(c.N), col_sum(c.N), positive(c.B);
    problem.statistics(row_top.data(), row_sum.data(), symmetric ? col_top.data() : nullptr, col_sum.data(), nullptr,
                       false, kUnclipped<T>, group_of<T>(scores, i, problem.stored_elements()), positive.data());
    auto known = [](int64_t n, const std::vector<T>& top, const std::vector<T>& sum, T* to) {
      to_lse(n, top.data(), sum.data(), to);
      rounding_factors(n, top.data(), sum.data(), to, to + n);
    };
    known(c.B, row_top, row_sum, group_of<T>(row, i, 2 * c.B));
    if (symmetric) known(c.N, col_top, col_sum, group_of<T>(col, i, 2 * c.N));
    T* const out = group_of<T>(losses, i, c.B);
    // nearly cancels once a critic is trained, so subtract before the logarithm is added
    auto above = [&](const std::vector<T>& top, const std::vector<T>& sum, int64_t k) {
      return std::log(sum[k]) + (top[k] - positive[k]);
    };
    for (int64_t k = 0; k < c.B; ++k)
      out[k] = symmetric ? (above(row_top, row_sum, k) + above(col_top, col_sum, k)) / 2 : above(row_top, row_sum, k);
  });
  return {losses, row, col, scores};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_losses_grad(
    MK_DOT_PROBLEM_PARAMETERS, const Tensor& row,
    const Tensor& col, const Tensor& scores, const Tensor& g, bool symmetric, bool normalize, int64_t needs) {
  const Call c(MK_DOT_PROBLEM);
  const AnyUnits units(c, normalize);
  Outputs out(c, needs);
  c.each_group([&]<class T, class E>(int64_t i, int64_t threads) {
    Group<T> group = c.group<T>(i);
    Gradients<T> gradients = out.group<T>(c, i);
    units.enter(c, i, group, gradients);
    Problem<T, E> problem(group, threads, needs);
    const T* const slopes = g.const_data_ptr<T>() + i * c.B;
    std::vector<T> g_row(c.B), g_col(symmetric ? c.N : 0), positive(c.B);
    for (int64_t k = 0; k < c.B; ++k) positive[k] = -slopes[k];
    auto enter = [&](const Tensor& known, int64_t n, std::vector<T>& g) {
      const T* const lse = known.const_data_ptr<T>() + i * 2 * n;
      for (int64_t k = 0; k < n; ++k) g[k] = (symmetric ? slopes[k] / 2 : slopes[k]) * lse[n + k];
      return lse;
    };
    Weights<T> weights;
    weights.row_lse = enter(row, c.B, g_row), weights.g_row = g_row.data();
    if (symmetric) weights.col_lse = enter(col, c.N, g_col), weights.g_col = g_col.data();
    weights.g_pos = positive.data();
    const auto order = problem.stored_shape();  // depends on the number of threads, which may have changed since
    const bool kept = scores.dim() == 5 && std::equal(order.begin(), order.end(), scores.sizes().begin() + 1);
    const T* const stored = kept ? scores.const_data_ptr<T>() + i * problem.stored_elements() : nullptr;
    problem.gradient(weights, gradients, nullptr, stored, nullptr);
  });
  return {out.x, out.y, out.scale, out.row_bias, out.col_bias};
}

}  // namespace
}  // namespace mk::dot_critic

TORCH_LIBRARY_IMPL(mi_kernels_cpu, CPU, m) {
  m.impl("dot_critic_stats", &mk::dot_critic::stats);
  m.impl("dot_critic_grad", &mk::dot_critic::grad);
  m.impl("dot_critic_loss", &mk::dot_critic::loss);
  m.impl("dot_critic_row_losses", &mk::dot_critic::row_losses);
  m.impl("dot_critic_row_losses_grad", &mk::dot_critic::row_losses_grad);
}
