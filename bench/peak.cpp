// The fp32 rate of fused multiply-adds whose operands are registers: what no matmul on this processor exceeds.
// Usage: peak THREADS; prints GFLOP/s, the best of five rounds. Built with -O3 -march=native by bench/peak.py.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
constexpr int kChains = 12;  // more than latency times units, fewer than registers
constexpr long kSteps = 4'000'000;

static float run(float factor) {
  Vector sums[kChains], a = Vector{} + factor, b = Vector{} + 1.0f;
  for (int k = 0; k < kChains; ++k) sums[k] = Vector{} + factor * static_cast<float>(k);  // unlike, or one would do
  for (long step = 0; step < kSteps; ++step)
#pragma GCC unroll 12
    for (int k = 0; k < kChains; ++k) sums[k] = sums[k] * a + b;
  float total = 0;
  for (const Vector& sum : sums) total += sum[0];
  return total;
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  std::vector<float> kept(threads);
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back([&, t] { kept[t] = run(0.5f + 0.01f * static_cast<float>(t)); });
    kept[0] = run(0.5f);
    for (std::thread& other : others) other.join();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, 2.0 * threads * kSteps * kChains * (kBytes / 4) / seconds / 1e9);
  }
  float sink = 0;
  for (float k : kept) sink += k;
  std::printf("%.1f\n", sink == 12345.0f ? 0.0 : best);
}
