// Which pairs of the dot critic take part, and what a tile needs to know of its rows.
#pragma once

#include "../common/cuda/math.cuh"
#include "../common/cuda/tiles.cuh"
#include "launch.cuh"
#include "schema.h"

namespace mk::dot_critic {

constexpr int kThreads = 256, kWarps = 8;

// Without branches: the tiles' loops over pairs are unrolled.
__device__ __forceinline__ bool allowed(int pairs, int own, int other, int64_t own_id, int64_t other_id, bool positive) {
  const bool same_place = (pairs == kOffDiagonal) & (own == other);
  const bool same_id = (pairs >= kUnequalIds) & (own_id == other_id);
  return !(same_place | (same_id & !((pairs == kUnequalIdsOrPositive) & positive)));
}

__device__ __forceinline__ float clamped(float s, float clip) {  // -inf, which takes no part, and NaN stay
  if (s > clip) return clip;
  return s < -clip && s > -MK_INFINITY ? -clip : s;
}

template <class T>
__device__ __forceinline__ T element(const T* p, int64_t i, bool inside, T otherwise) {
  return p != nullptr && inside ? __ldg(p + i) : otherwise;
}

}  // namespace mk::dot_critic
