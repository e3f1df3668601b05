// Attention operators on a CPU. Python has checked the shapes. Inputs are converted to the accumulation type. The heads
// of all items of all pairs are distributed over threads, the longest pairs first.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <numeric>
#include <vector>

#include "../common/subnormals.h"
#include "wide.h"

namespace mk::cross_attention {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;

template <class T>
const Kernels<T>& kernels() {
  static const Kernels<T> found = [] {
    constexpr bool kDouble = std::is_same_v<T, double>;
#if defined(MK_LEVELS)
    if (__builtin_cpu_supports("x86-64-v4"))
      if constexpr (kDouble) return double_kernels_v4();
      else return float_kernels_v4();
    if (__builtin_cpu_supports("x86-64-v3"))
      if constexpr (kDouble) return double_kernels_v3();
      else return float_kernels_v3();
#endif
    if constexpr (kDouble) return double_kernels_base();
    else return float_kernels_base();
  }();
  return found;
}

// Scratch elements that small.h needs at most.
template <class T>
int64_t small_scratch(const Item<T>& it, bool backward) {
  if (!backward) return it.Tk * (2 * kSmall + 3 * kMostLanes) + 512;
  return it.Tq * 2 * kSmall + round_up(it.Tk, kMostLanes) * (4 * kSmall + 8) + 512;
}

struct Call {
  at::TensorList query_lengths, key_lengths;
  at::IntArrayRef offset;
  at::ArrayRef<double> scale, dropout_p;
  Tensor seed;
  bool sparse;
};

Tensors cast(at::TensorList list, at::ScalarType type) {
  Tensors out;
  for (const Tensor& t : list) out.push_back(t.to(type));
  return out;
}

Tensors cast_lengths(at::TensorList list) {
  Tensors out;
  for (const Tensor& t : list) out.push_back(t.contiguous());
  return out;
}

template <class T>
View<T> view_of(const Tensor& t, int64_t b, int64_t h) {
  return {t.const_data_ptr<T>() + b * t.stride(0) + h * t.stride(1), t.stride(2), t.stride(3)};
}

template <class T>
struct Problem {
  const Call& call;
  Tensors query, key, value, query_lengths, key_lengths;
  Tensors out, stat, grad_out, dq, dk, dv;

  int64_t pairs() const { return static_cast<int64_t>(query.size()); }
  typename Kernels<T>::Small small(int64_t n) const {
    const int64_t width = std::max(query[n].size(3), value[n].size(3));
    return width <= kSmall ? kernels<T>().small[width] : nullptr;
  }

  int64_t length(const Tensor& lengths, int64_t b, int64_t most) const {
    return lengths.numel() ? std::clamp<int64_t>(lengths.const_data_ptr<int64_t>()[b], 0, most) : most;
  }

  Dropout dropout(int64_t n, int64_t head) const {
    const double p = call.dropout_p[n];
    if (p <= 0) return {false, 0, 0, 1.0};
    const auto seed = static_cast<uint64_t>(call.seed.const_data_ptr<int64_t>()[n]);
    const uint32_t key = mix(mix(static_cast<uint32_t>(seed)) ^ static_cast<uint32_t>(seed >> 32));
    return {true, mix(key + static_cast<uint32_t>(head)), static_cast<uint32_t>(p * 4294967296.0), 1.0 / (1.0 - p)};
  }

  Item<T> item(int64_t n, int64_t head) const {
    const Tensor& q = query[n];
    const int64_t heads = q.size(1), b = head / heads, h = head % heads;
    const int64_t Tq = q.size(2), Tk = key[n].size(2), E = q.size(3), Ev = value[n].size(3);
    Item<T> it{view_of<T>(q, b, h), view_of<T>(key[n], b, h), view_of<T>(value[n], b, h), Tq, Tk, E, Ev,
               length(query_lengths[n], b, Tq), length(key_lengths[n], b, Tk), call.offset[n],
               static_cast<T>(call.scale[n]), call.sparse, dropout(n, head), nullptr, nullptr, {}, nullptr, nullptr,
               nullptr};
    auto rows = [&](const Tensor& t, int64_t size) { return const_cast<T*>(t.const_data_ptr<T>()) + head * size; };
    it.out = rows(out[n], Tq * Ev), it.stat = rows(stat[n], Tq);
    if (!grad_out.empty()) {
      it.grad_out = view_of<T>(grad_out[n], b, h);
      it.dq = rows(dq[n], Tq * E), it.dk = rows(dk[n], Tk * E), it.dv = rows(dv[n], Tk * Ev);
    }
    return it;
  }

  // Work items in decreasing order of size. Each is computed independently, so results do not depend on the thread.
  void run(bool backward) {
    std::vector<int64_t> order(pairs());
    std::iota(order.begin(), order.end(), 0);
    auto cost = [&](int64_t n) { return query[n].size(2) * key[n].size(2) * (query[n].size(3) + value[n].size(3) + 8); };
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost(a) > cost(b); });
    std::vector<std::pair<int64_t, int64_t>> work;
    double total = 0;
    for (int64_t n : order) {
      const int64_t heads = query[n].size(0) * query[n].size(1);
      for (int64_t head = 0; head < heads; ++head) work.emplace_back(n, head);
      total += static_cast<double>(cost(n)) * static_cast<double>(heads);
    }
    const auto items = static_cast<int64_t>(work.size());
    // For less work than this, starting a second thread costs more than it saves.
    const int64_t most = total < 2e5 ? 1 : at::get_num_threads();
    std::atomic<int64_t> next{0};
    auto worker = [&](int64_t, int64_t) {
      const FlushSubnormals flush;
      Scratch<T> scratch;
      bool wide = false;
      for (int64_t w = next++; w < items; w = next++) {
        const auto [n, head] = work[w];
        const Item<T> it = item(n, head);
        if (const auto kernel = small(n)) {
          scratch.reset(small_scratch(it, backward));
          kernel(it, backward, scratch);
        } else {
          wide = true;
          scratch.reset(wide_scratch(it, backward));
          run_wide(it, kernels<T>(), backward, scratch);
        }
      }
      if (wide) release_gemm(false);
    };
    const int64_t threads = std::min(items, most);
    if (threads <= 1) worker(0, 1);
    else at::parallel_for(0, threads, 1, worker);
  }
};

template <class F>
Tensors with_type(const Tensor& like, F&& f) {
  return like.scalar_type() == at::kDouble ? f.template operator()<double>() : f.template operator()<float>();
}

Tensors forward(at::TensorList query, at::TensorList key, at::TensorList value, at::TensorList query_lengths,
                at::TensorList key_lengths, at::IntArrayRef offset, at::ArrayRef<double> scale,
                at::ArrayRef<double> dropout_p, const Tensor& seed, bool sparse) {
  const Call call{query_lengths, key_lengths, offset, scale, dropout_p, seed.contiguous(), sparse};
  return with_type(query[0], [&]<class T>() {
    constexpr auto type = c10::CppTypeToScalarType<T>::value;
    Problem<T> problem{call, cast(query, type), cast(key, type), cast(value, type), cast_lengths(query_lengths),
                       cast_lengths(key_lengths), {}, {}, {}, {}, {}, {}};
    for (size_t n = 0; n < query.size(); ++n) {
      const Tensor& q = problem.query[n];
      problem.out.push_back(at::empty({q.size(0), q.size(1), q.size(2), value[n].size(3)}, q.options()));
      problem.stat.push_back(at::empty({q.size(0), q.size(1), q.size(2)}, q.options()));
    }
    problem.run(false);
    Tensors found = cast(problem.out, query[0].scalar_type());
    found.insert(found.end(), problem.stat.begin(), problem.stat.end());
    return found;
  });
}

Tensors backward(at::TensorList grad_out, at::TensorList query, at::TensorList key, at::TensorList value,
                 at::TensorList out, at::TensorList stat, at::TensorList query_lengths, at::TensorList key_lengths,
                 at::IntArrayRef offset, at::ArrayRef<double> scale, at::ArrayRef<double> dropout_p, const Tensor& seed,
                 bool sparse) {
  const Call call{query_lengths, key_lengths, offset, scale, dropout_p, seed.contiguous(), sparse};
  return with_type(query[0], [&]<class T>() {
    constexpr auto type = c10::CppTypeToScalarType<T>::value;
    Problem<T> problem{call, cast(query, type), cast(key, type), cast(value, type), cast_lengths(query_lengths),
                       cast_lengths(key_lengths), cast(out, type), {}, cast(grad_out, type), {}, {}, {}};
    for (Tensor& t : problem.out) t = t.contiguous();
    for (const Tensor& t : stat) problem.stat.push_back(t.contiguous());
    if (type != query[0].scalar_type() && !sparse) {
      // delta = <g, o> cancels against dp, so the rounding of a 16-bit output would dominate the error: recompute it.
      Problem<T> again{call, problem.query, problem.key, problem.value, problem.query_lengths, problem.key_lengths,
                       {}, {}, {}, {}, {}, {}};
      for (size_t n = 0; n < query.size(); ++n) {
        again.out.push_back(at::empty(out[n].sizes(), problem.query[n].options()));
        again.stat.push_back(at::empty(stat[n].sizes(), stat[n].options()));
      }
      again.run(false);
      problem.out = again.out;
    }
    auto like = [](const Tensor& t) { return at::empty(t.sizes(), t.options()); };
    for (size_t n = 0; n < query.size(); ++n) {
      problem.dq.push_back(like(problem.query[n])), problem.dk.push_back(like(problem.key[n]));
      problem.dv.push_back(like(problem.value[n]));
    }
    problem.run(true);
    Tensors found = problem.dq;
    found.insert(found.end(), problem.dk.begin(), problem.dk.end());
    found.insert(found.end(), problem.dv.begin(), problem.dv.end());
    return cast(found, query[0].scalar_type());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mi_kernels_cpu, CPU, m) {
  m.impl("cross_attention_forward", forward);
  m.impl("cross_attention_backward", backward);
}

}  // namespace mk::cross_attention
