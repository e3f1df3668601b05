// Tiles of pairs in the MLP critic's CUDA kernels: 16 rows of u against 8 rows of v; pair (i, j) has index p = 8 i + j.
#pragma once

#include "../common/cuda/math.cuh"
#include "../common/cuda/tiles.cuh"
#include "launch.cuh"

namespace mk::mlp_critic {

constexpr int kThreads = 256, kRows = 16, kColumns = 8, kPairs = kRows * kColumns;
constexpr int kUnits = 128;  // units of a layer in one block of a matrix product
constexpr int kPanelBytes = kPairs * kPanel;
// Unroll factor of loops over k-steps: with a larger one, TF32 kernels spill registers on sm_90a.
template <class P>
constexpr int kUnroll = P::terms == 1 ? 2 : kStepUnroll<P>;

__host__ __device__ inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

__device__ __forceinline__ float activate(float z, float slope) { return z < 0.0f ? slope * z : z; }

template <class P>
struct alignas(kChunk) Chunk {
  typename P::Element e[kPerChunk<P>];
};

// Features of u or v, as many as one chunk of operands holds. They are fp32 for every operand type, so that the first
// layer's sum u + v is rounded only once.
template <class P>
struct Features {
  float e[kPerChunk<P>];
};

// Loads the features of row i of [n, D] that start at f; elements outside are zero.
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

// The position along k of element e of a chunk. In 16 bit a chunk holds 8 consecutive positions; in fp32 it holds every
// second one of 8 (see load_right_down).
template <class P>
__device__ __forceinline__ int unit_of(int chunk, int e) {
  return P::terms == 0 ? 8 * chunk + e : 8 * (chunk / 2) + 2 * e + chunk % 2;
}

inline bool aligned_rows(const void* a, const void* b, int64_t row_bytes) {
  return row_bytes % kChunk == 0 && reinterpret_cast<uintptr_t>(a) % kChunk == 0 && reinterpret_cast<uintptr_t>(b) % kChunk == 0;
}

}  // namespace mk::mlp_critic
