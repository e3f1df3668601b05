// Launchers of attention's CUDA kernels for heads of up to kMostFeatures features: device pointers and strides.
#pragma once

#include <cstdint>

#include "../common/cuda/runtime.h"
#include "schema.h"

namespace mk::cross_attention {

enum class Type : int { fp32, bf16, fp16 };

struct Sequence {  // [B, heads, T, features] with contiguous features; strides in elements
  const void* data;
  int64_t per_item, per_head, per_row;
};

struct Pair {
  Sequence query, key, value, grad;
  const int64_t *query_lengths, *key_lengths, *seed;  // lengths [B], or null if all have full length; seed [1]
  void *out, *dquery, *dkey, *dvalue;                 // contiguous
  float *stat, *delta;                                // [B, heads, Tq]
  int items, heads, n_q, n_k, offset;                 // items: B; offset in [-n_q, n_k]
  uint32_t drop_below;
  float scale, keep;  // keep: 1 / (1 - dropout_p)
  int first;          // first work item, set by the launchers
};

struct Call {
  Pair pairs[kMostPairs];
  int count, E, EV;
  Type type;
  bool sparse, drops;
  int work;  // work items, set by the launchers
};

cudaError_t forward(const Call& call, cudaStream_t stream);
cudaError_t backward(const Call& call, cudaStream_t stream);

}  // namespace mk::cross_attention
