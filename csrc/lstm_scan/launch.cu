// Launchers of the LSTM scan: assign units and rows to blocks.
#include "launch.cuh"

#include <algorithm>

#include "kernels.cuh"

namespace mk::lstm_scan {
namespace {

int parts(int64_t n, int64_t size) { return static_cast<int>((n + size - 1) / size); }

struct Plan {
  Slicing s;
  int threads, at_once;  // at_once: row slices (over all groups) per launch
  bool staged;
};

Plan plan_of(const Sizes& z) {
  Plan plan{};
  Slicing& s = plan.s;
  const int fits = std::clamp(kWeights / z.H, 1, kMostThreads);
  s.slices = std::min(parts(z.H, fits), std::max(1, z.processors));
  s.units = parts(z.H, s.slices);
  s.slices = parts(z.H, s.units);
  plan.staged = static_cast<int64_t>(z.H) * s.units <= kWeights;
  const int at_once = std::max(1, z.processors / s.slices);
  const int most = std::min(kMostRows, kRowsOfThread * std::max(1, kMostThreads / s.units));
  const int share = parts(static_cast<int64_t>(z.G) * z.B, at_once);
  s.rows = std::clamp(parts(share, kRowsOfThread) * kRowsOfThread, kRowsOfThread, most);
  s.row_slices = parts(z.B, s.rows);
  plan.threads = parts(s.units * (s.rows / kRowsOfThread), 32) * 32;
  plan.at_once = s.slices == 1 ? z.G * s.row_slices : at_once;
  return plan;
}

template <class A>
using Kernel = void (*)(Sizes, A, Slicing);

template <class A>
cudaError_t run(const Sizes& z, const A& a, Kernel<A> alone, Kernel<A> together, Kernel<A> through_cache,
                cudaStream_t stream) {
  Plan plan = plan_of(z);
  const int all = z.G * plan.s.row_slices;
  for (; plan.s.first < all; plan.s.first += plan.at_once) {
    const dim3 grid(static_cast<unsigned>(std::min(plan.at_once, all - plan.s.first)) * plan.s.slices);
    const cudaError_t error =
        plan.s.slices == 1 && plan.staged
            ? launch(alone, grid, plan.threads, kShared, stream, z, a, plan.s)
            : launch_cooperative(plan.staged ? together : through_cache, grid, plan.threads, kShared, stream, z, a, plan.s);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t forward(const Sizes& sizes, const Forward& f, cudaStream_t stream) {
  return run<Forward>(sizes, f, forward_kernel<true, false>, forward_kernel<true, true>, forward_kernel<false, true>, stream);
}

cudaError_t backward(const Sizes& sizes, const Backward& b, cudaStream_t stream) {
  return run<Backward>(sizes, b, backward_kernel<true, false>, backward_kernel<true, true>, backward_kernel<false, true>,
                       stream);
}

}  // namespace mk::lstm_scan
