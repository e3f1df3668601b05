// Launchers of attention's CUDA kernels: one launch forward and two backward for all pairs of a call.
#include "launch.cuh"

#include <algorithm>
#include <type_traits>

#include "backward.cuh"
#include "forward.cuh"

namespace mk::cross_attention {
namespace {

constexpr auto kTooMuch = static_cast<cudaError_t>(1);  // cudaErrorInvalidValue

template <int D, class Kernel, class Length>
cudaError_t start(Kernel kernel, Call call, Length n, cudaStream_t stream) {
  int64_t work = 0;
  for (int i = 0; i < call.count; ++i) {
    Pair& p = call.pairs[i];
    p.first = static_cast<int>(work);
    work += static_cast<int64_t>(p.items) * p.heads * ((n(p) + kOwned<D> - 1) / kOwned<D>);
    if (work > INT32_MAX - kWarps) return kTooMuch;
  }
  call.work = static_cast<int>(work);
  return launch(kernel, dim3(static_cast<unsigned>((work + kWarps - 1) / kWarps)), kThreads, kShared<D>, stream, call);
}

// Calls f.template operator()<D, sparse, drops>() with the call's rule and dropout.
template <int D, class F>
cudaError_t with_rule(const Call& call, F f) {
  if (call.sparse) return call.drops ? f.template operator()<D, true, true>() : f.template operator()<D, true, false>();
  return call.drops ? f.template operator()<D, false, true>() : f.template operator()<D, false, false>();
}
template <class F>
cudaError_t with_features(const Call& call, F f) {
  switch ((std::max(call.E, call.EV) + 3) / 4) {
    case 1: return with_rule<4>(call, f);
    case 2: return with_rule<8>(call, f);
    case 3: return with_rule<12>(call, f);
    case 4: return with_rule<16>(call, f);
    default: return kTooMuch;
  }
}

}  // namespace

cudaError_t forward(const Call& call, cudaStream_t stream) {
  return with_features(call, [&]<int D, bool sparse, bool drops>() {
    return start<D>(forward_kernel<D, sparse, drops>, call, [](const Pair& p) { return p.n_q; }, stream);
  });
}

cudaError_t backward(const Call& call, cudaStream_t stream) {
  return with_features(call, [&]<int D, bool sparse, bool drops>() {
    const cudaError_t error =
        start<D>(query_kernel<D, sparse, drops>, call, [](const Pair& p) { return p.n_q; }, stream);
    if (error != cudaSuccess) return error;
    return start<D>(key_kernel<D, sparse, drops>, call, [](const Pair& p) { return p.n_k; }, stream);
  });
}

}  // namespace mk::cross_attention
