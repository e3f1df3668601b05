// Attention's operators on CUDA tensors (with the emulator: on CPU tensors). Python has validated the inputs.
#ifdef MI_KERNELS_WITH_CUDA

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <vector>

#include "../common/cuda/torch.h"
#include "launch.cuh"

namespace mk::cross_attention {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Type::fp32;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::fp16;
    default: TORCH_CHECK(false, "cross_attention has no CUDA kernel for ", x.scalar_type());
  }
}

// The inputs of a call, in the kernels' layouts. Holds the copies that this takes.
struct Arguments {
  Tensors query, key, value, query_lengths, key_lengths;
  std::vector<int64_t> offset;
  std::vector<double> scale, dropout;
  Tensor seed;
  bool sparse;
  Tensors copies;

  Sequence sequence(const Tensor& t) {
    const Tensor rows = t.stride(3) == 1 || t.size(3) == 1 ? t : t.contiguous();
    copies.push_back(rows);
    return {rows.const_data_ptr(), rows.stride(0), rows.stride(1), rows.stride(2)};
  }
  const int64_t* lengths(const Tensor& t) {
    if (!t.numel()) return nullptr;
    copies.push_back(t.contiguous());
    return copies.back().const_data_ptr<int64_t>();
  }
  Pair pair(size_t i) {
    const Tensor &q = query[i], &k = key[i];
    constexpr int64_t most = 1 << 28;
    TORCH_CHECK(q.size(2) <= most && k.size(2) <= most, "cross_attention: Tq and Tk must not exceed 2^28");
    Pair p{};
    p.query = sequence(q), p.key = sequence(k), p.value = sequence(value[i]);
    p.query_lengths = lengths(query_lengths[i]), p.key_lengths = lengths(key_lengths[i]);
    p.seed = seed.const_data_ptr<int64_t>() + i;
    p.items = static_cast<int>(q.size(0)), p.heads = static_cast<int>(q.size(1));
    p.n_q = static_cast<int>(q.size(2)), p.n_k = static_cast<int>(k.size(2));
    p.offset = static_cast<int>(std::clamp<int64_t>(offset[i], -q.size(2), k.size(2)));
    p.drop_below = static_cast<uint32_t>(dropout[i] * 4294967296.0);
    p.scale = static_cast<float>(scale[i]), p.keep = static_cast<float>(1.0 / (1.0 - dropout[i]));
    return p;
  }
  // Calls run(call) for each group of pairs with the same head sizes; set(pair, i) first fills in the fields that only
  // the forward or only the backward has.
  template <class Set, class Run>
  void for_groups(Set set, Run run) {
    std::map<std::pair<int64_t, int64_t>, std::vector<size_t>> alike;
    for (size_t i = 0; i < query.size(); ++i) alike[{query[i].size(3), value[i].size(3)}].push_back(i);
    for (const auto& [features, members] : alike) {
      const auto [E, EV] = features;
      TORCH_CHECK(std::max(E, EV) <= kMostFeatures, "cross_attention's CUDA kernels take heads of up to ", kMostFeatures,
                  " features, got ", E, " and ", EV);
      for (size_t first = 0; first < members.size(); first += kMostPairs) {
        Call call{};
        call.E = static_cast<int>(E), call.EV = static_cast<int>(EV), call.type = type_of(query[0]), call.sparse = sparse;
        for (size_t n = first; n < std::min<size_t>(members.size(), first + kMostPairs); ++n) {
          Pair& p = call.pairs[call.count++] = pair(members[n]);
          call.drops |= p.drop_below > 0 || dropout[members[n]] > 0;
          set(p, members[n]);
        }
        run(call);
      }
    }
  }
};

Tensors like(const Tensors& ts) {
  Tensors found;
  for (const Tensor& t : ts) found.push_back(at::empty(t.sizes(), t.options()));
  return found;
}

Tensors forward_op(at::TensorList query, at::TensorList key, at::TensorList value, at::TensorList query_lengths,
                   at::TensorList key_lengths, at::IntArrayRef offset, at::ArrayRef<double> scale,
                   at::ArrayRef<double> dropout, const Tensor& seed, bool sparse) {
  const DeviceGuard guard(query[0]);
  Arguments a{query.vec(), key.vec(), value.vec(), query_lengths.vec(), key_lengths.vec(), offset.vec(),
              scale.vec(), dropout.vec(), seed.contiguous(), sparse, {}};
  Tensors found, stats;
  for (size_t i = 0; i < query.size(); ++i) {
    const auto rows = query[i].sizes().slice(0, 3);
    found.push_back(at::empty({rows[0], rows[1], rows[2], value[i].size(3)}, query[i].options()));
    stats.push_back(at::empty(rows, query[i].options().dtype(at::kFloat)));
  }
  a.for_groups(
      [&](Pair& p, size_t i) { p.out = found[i].mutable_data_ptr(), p.stat = stats[i].mutable_data_ptr<float>(); },
      [](const Call& call) { check_launch(forward(call, current_stream()), "cross_attention_forward"); });
  found.insert(found.end(), stats.begin(), stats.end());
  return found;
}

Tensors backward_op(at::TensorList grad_out, at::TensorList query, at::TensorList key, at::TensorList value,
                    at::TensorList out, at::TensorList stat, at::TensorList query_lengths, at::TensorList key_lengths,
                    at::IntArrayRef offset, at::ArrayRef<double> scale, at::ArrayRef<double> dropout,
                    const Tensor& seed, bool sparse) {
  const DeviceGuard guard(query[0]);
  Arguments a{query.vec(), key.vec(), value.vec(), query_lengths.vec(), key_lengths.vec(), offset.vec(),
              scale.vec(), dropout.vec(), seed.contiguous(), sparse, {}};
  Tensors outs, stats;
  for (size_t i = 0; i < query.size(); ++i) outs.push_back(out[i].contiguous()), stats.push_back(stat[i].contiguous());
  Tensors dq = like(a.query), dk = like(a.key), dv = like(a.value), delta = like(stats);
  a.for_groups(
      [&](Pair& p, size_t i) {
        p.grad = a.sequence(grad_out[i]);
        p.out = const_cast<void*>(outs[i].const_data_ptr());  // the backward kernels only read out and stat
        p.stat = const_cast<float*>(stats[i].const_data_ptr<float>());
        p.delta = delta[i].mutable_data_ptr<float>();
        p.dquery = dq[i].mutable_data_ptr(), p.dkey = dk[i].mutable_data_ptr(), p.dvalue = dv[i].mutable_data_ptr();
      },
      [](const Call& call) { check_launch(backward(call, current_stream()), "cross_attention_backward"); });
  dq.insert(dq.end(), dk.begin(), dk.end());
  dq.insert(dq.end(), dv.begin(), dv.end());
  return dq;
}

}  // namespace
}  // namespace mk::cross_attention

TORCH_LIBRARY_FRAGMENT(mi_kernels_cuda, m) {
  m.def(
      "cross_attention_forward(Tensor[] query, Tensor[] key, Tensor[] value, Tensor[] query_lengths, "
      "Tensor[] key_lengths, int[] causal_offset, float[] scale, float[] dropout_p, Tensor seed, bool sparse) "
      "-> Tensor[]");
  m.def(
      "cross_attention_backward(Tensor[] grad_out, Tensor[] query, Tensor[] key, Tensor[] value, Tensor[] out, "
      "Tensor[] stat, Tensor[] query_lengths, Tensor[] key_lengths, int[] causal_offset, float[] scale, "
      "float[] dropout_p, Tensor seed, bool sparse) -> Tensor[]");
}
TORCH_LIBRARY_IMPL(mi_kernels_cuda, MK_CUDA_KEY, m) {
  m.impl("cross_attention_forward", &mk::cross_attention::forward_op);
  m.impl("cross_attention_backward", &mk::cross_attention::backward_op);
}

#endif  // MI_KERNELS_WITH_CUDA
