// Tiles of pairs that the MLP critic's CUDA kernels share: 16 rows of u against 8 rows of v, pair p = 8 i + j.
#pragma once

#include "../common/cuda/math.cuh"
#include "../common/cuda/tiles.cuh"
#include "launch.cuh"

namespace mk::mlp_critic {

constexpr int kThreads = 256, kRows = 16, kColumns = 8, kPairs = kRows * kColumns;
constexpr int kUnits = 128;  // of a layer in a block of a product
constexpr int kPanelBytes = kPairs * kPanel;
// Further than this, loops over k-steps spill in TF32 on sm_90a.
template <class P>
constexpr int kUnroll = P::terms == 1 ? 2 : kStepUnroll<P>;

__host__ __device__ inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

__device__ __forceinline__ float activate(float z, float slope) { return z < 0.0f ? slope * z : z; }

template <class P>
struct alignas(kChunk) Chunk {
  typename P::Element e[kPerChunk<P>];
};

// As many features of u or v as a chunk of operands holds. They stay in fp32 for every type of operand: a pair's first
// layer is a sum of one u and one v, which is rounded once.
template <class P>
struct Features {
  float e[kPerChunk<P>];
};

// Features f and on of row i of [n, D], zeros outside.
template <class P>
__device__ __forceinline__ Features<P> load_features(const float* from, int i, int n, int f, int D, bool aligned) {
  Features<P> c{};
  if (i >= n || f >= D) return c;
  const float* p = from + static_cast<int64_t>(i) * D + f;
  if (aligned) {  // D is a multiple of a chunk of operands
#pragma unroll
    for (int k = 0; k < kPerChunk<P>; k += 4) {
      const float4 four = *reinterpret_cast<const float4*>(p + k);
      c.e[k] = four.x, c.e[k + 1] = four.y, c.e[k + 2] = four.z, c.e[k + 3] = four.w;
    }
    return c;
  }
#pragma unroll
  for (int k = 0; k < kPerChunk<P>; ++k)
    if (f + k < D) c.e[k] = p[k];
  return c;
}

// weight * act(u_i + v_j) for one chunk of features.
template <class P>
__device__ __forceinline__ Chunk<P> hidden_chunk(const Features<P>& u, const Features<P>& v, float slope, float weight) {
  Chunk<P> h;
#pragma unroll
  for (int k = 0; k < kPerChunk<P>; ++k)
    h.e[k] = from_float<typename P::Element>(weight * activate(u.e[k] + v.e[k], slope));
  return h;
}

// Which of 8 (16-bit operands: its own 8; fp32: 4 of 8) positions of k an operand's chunk holds, see load_right_down.
template <class P>
__device__ __forceinline__ int unit_of(int chunk, int e) {
  return P::terms == 0 ? 8 * chunk + e : 8 * (chunk / 2) + 2 * e + chunk % 2;
}

inline bool aligned_rows(const void* a, const void* b, int64_t row_bytes) {
  return row_bytes % kChunk == 0 && reinterpret_cast<uintptr_t>(a) % kChunk == 0 && reinterpret_cast<uintptr_t>(b) % kChunk == 0;
}

}  // namespace mk::mlp_critic
