// Helpers of the dot critic's kernels: which pairs are included, clipping, and optional per-row inputs.
#pragma once

#include "../common/cuda/math.cuh"
#include "../common/cuda/tiles.cuh"
#include "launch.cuh"
#include "schema.h"

namespace mk::dot_critic {

constexpr int kThreads = 256, kWarps = 8;

// Whether a pair is included. Written without branches, because the loops over a tile's pairs are unrolled.
__device__ __forceinline__ bool allowed(int pairs, int own, int other, int64_t own_id, int64_t other_id, bool positive) {
  const bool same_place = (pairs == kOffDiagonal) & (own == other);
  const bool same_id = (pairs >= kUnequalIds) & (own_id == other_id);
  return !(same_place | (same_id & !((pairs == kUnequalIdsOrPositive) & positive)));
}

__device__ __forceinline__ float clamped(float s, float clip) {  // -inf (an excluded pair) and NaN are unchanged
  if (s > clip) return clip;
  return s < -clip && s > -MK_INFINITY ? -clip : s;
}

template <class T>
__device__ __forceinline__ T element(const T* p, int64_t i, bool inside, T otherwise) {
  return p != nullptr && inside ? __ldg(p + i) : otherwise;
}

}  // namespace mk::dot_critic
