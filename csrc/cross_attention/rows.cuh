// Shared by attention's CUDA kernels: work items, rows of features in registers, tiles of the other side, dropout.
//
// Each warp processes one work item: it owns 32 R rows of one head, R per lane, and multiplies them with all rows of
// the other side, which it loads into its own slice of shared memory 32 at a time. All lanes read the same row of a
// tile at once, which shared memory broadcasts. With two owned rows per lane, each read serves two products; otherwise
// reads would bound the kernels (four to eight reads of 16 bytes for D = 8 against 16 to 32 multiplications). Tensor
// cores are not used: with so few features they would multiply mostly padding (D of 16). Warps never wait for one
// another, so that rows of any length fill the device.
//
// Arithmetic is fp32 whatever the type in memory; rows are padded to D = 4, 8, 12 or 16 features.
#pragma once

#include "../common/cuda/math.cuh"
#include "launch.cuh"

#ifdef MI_CUDA_EMULATOR
#define __grid_constant__
#endif

namespace mk::cross_attention {

constexpr int kThreads = 128, kWarps = kThreads / 32, kTile = 32, kUnroll = 8;

// R is bound by registers: a lane keeps 4 R D values in the backward. R = 2 for D > 8 would leave only eight warps per
// multiprocessor.
template <int D>
constexpr int kRowsPerLane = D <= 8 ? 2 : 1;
// Rows of a tile that the backward multiplies at once.
template <int D>
constexpr int kStep = D <= 8 ? 4 : 2;
template <int D>
constexpr int kOwned = 32 * kRowsPerLane<D>;
// A tile's row holds two rows of D and four more numbers: an odd number of 16-byte chunks, so that eight lanes that
// write one chunk each cause no bank conflict.
template <int D>
constexpr int kStride = 2 * D + 4;
template <int D>
constexpr int kShared = kWarps * kTile * kStride<D> * static_cast<int>(sizeof(float));

struct Head {  // the rows of a work item
  const Pair* pair;
  int item, row, end_q, end_k;  // item: b heads + head; row: the first owned row; end_q, end_k: lengths
  int64_t b, h;
};

// Locates a work item, which is `owned` rows of the side whose length is n(pair).
template <class Length>
__device__ __forceinline__ Head head_of(const Call& call, int work, int owned, Length n) {
  int i = 0;
  while (i + 1 < call.count && work >= call.pairs[i + 1].first) ++i;
  const Pair& p = call.pairs[i];
  const int tiles = (n(p) + owned - 1) / owned, local = work - p.first;
  Head at{&p, local / tiles, local % tiles * owned, p.n_q, p.n_k, 0, 0};
  at.b = at.item / p.heads, at.h = at.item % p.heads;
  if (p.query_lengths) at.end_q = static_cast<int>(min(max(p.query_lengths[at.b], int64_t{0}), int64_t{p.n_q}));
  if (p.key_lengths) at.end_k = static_cast<int>(min(max(p.key_lengths[at.b], int64_t{0}), int64_t{p.n_k}));
  return at;
}

struct Rows {  // of one head; rows beyond n count as zero and are not read
  const void* data;
  int64_t at, per_row;
  int n, features;
  Type type;
};

__device__ __forceinline__ Rows rows_of(const Sequence& s, const Head& at, int n, int features, Type type) {
  return {s.data, at.b * s.per_item + at.h * s.per_head, s.per_row, n, features, type};
}

__device__ __forceinline__ float element(Type type, const void* data, int64_t i) {
  if (type == Type::fp32) return static_cast<const float*>(data)[i];
  if (type == Type::bf16) return to_float(static_cast<const bf16*>(data)[i]);
  return to_float(static_cast<const fp16*>(data)[i]);
}

template <int D>
__device__ __forceinline__ void load_row(float (&x)[D], const Rows& rows, int i) {
  const int64_t from = rows.at + i * rows.per_row;
#pragma unroll
  for (int e = 0; e < D; ++e) x[e] = i < rows.n && e < rows.features ? element(rows.type, rows.data, from + e) : 0.0f;
}

template <int D>
__device__ __forceinline__ void store_row(void* data, int64_t from, const float (&x)[D], float factor, int features,
                                          Type type) {
#pragma unroll
  for (int e = 0; e < D; ++e) {
    if (e >= features) continue;
    const float value = x[e] * factor;
    if (type == Type::fp32) static_cast<float*>(data)[from + e] = value;
    else if (type == Type::bf16) static_cast<bf16*>(data)[from + e] = from_float<bf16>(value);
    else static_cast<fp16*>(data)[from + e] = from_float<fp16>(value);
  }
}

template <int D>
__device__ __forceinline__ void clear(float (&x)[D]) {
#pragma unroll
  for (int e = 0; e < D; ++e) x[e] = 0.0f;
}

template <int D>
__device__ __forceinline__ void put_row(float* to, const float (&x)[D], float factor) {
#pragma unroll
  for (int e = 0; e < D; e += 4)
    *reinterpret_cast<float4*>(to + e) =
        make_float4(x[e] * factor, x[e + 1] * factor, x[e + 2] * factor, x[e + 3] * factor);
}

template <int D>
__device__ __forceinline__ void get_row(float (&x)[D], const float* from) {
#pragma unroll
  for (int e = 0; e < D; e += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + e);
    x[e] = four.x, x[e + 1] = four.y, x[e + 2] = four.z, x[e + 3] = four.w;
  }
}

template <int D>
__device__ __forceinline__ float dot(const float (&x)[D], const float (&y)[D]) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < D; ++e) sum += x[e] * y[e];
  return sum;
}

template <int D>
__device__ __forceinline__ void add(float (&sum)[D], float factor, const float (&x)[D]) {
#pragma unroll
  for (int e = 0; e < D; ++e) sum[e] += factor * x[e];
}

// Loads rows first .. end of `a`, times `factor` (with `both`, also of `b`), into the tile 32 at a time, lets
// extra(row, place) write the four further numbers, and calls visit(row) for each tile. The next tile's loads are in
// flight during the visit.
template <int D, bool both, class Extra, class Visit>
__device__ __forceinline__ void walk(const Rows& a, float factor, const Rows& b, int first, int end, float* tile,
                                     Extra extra, Visit visit) {
  const int lane = threadIdx.x % 32;
  float* mine = tile + lane * kStride<D>;
  float x[D], y[D];
  load_row(x, a, first + lane);
  if (both) load_row(y, b, first + lane);
  for (int row = first; row < end; row += kTile) {
    __syncwarp();  // no lane reads the previous tile any more
    put_row(mine, x, factor);
    if (both) put_row(mine + D, y, 1.0f);
    extra(row + lane, mine + 2 * D);
    __syncwarp();
    if (row + kTile < end) {
      load_row(x, a, row + kTile + lane);
      if (both) load_row(y, b, row + kTile + lane);
    }
    visit(row);
  }
}

struct NoExtra {
  __device__ __forceinline__ void operator()(int, float*) const {}
};

__device__ __forceinline__ uint32_t mix(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du;
  x ^= x >> 15, x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// Dropout's hash, as the operator's schema defines it.
struct RowKeys {
  uint32_t first, second;
};
__device__ __forceinline__ uint32_t head_key(const Pair& p, int item) {
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  return mix(mix(mix(static_cast<uint32_t>(seed)) ^ static_cast<uint32_t>(seed >> 32)) + static_cast<uint32_t>(item));
}
__device__ __forceinline__ RowKeys row_keys(uint32_t head, int i) {
  const uint32_t first = mix(head + static_cast<uint32_t>(i));
  return {first, mix(head ^ first)};
}
__device__ __forceinline__ bool kept(const RowKeys& row, int j, uint32_t drop_below) {
  uint32_t x = row.first + 0x9e3779b9u * static_cast<uint32_t>(j);
  x ^= x >> 16;
  x = (x * 0x7feb352du) ^ row.second;
  x ^= x >> 15, x *= 0x846ca68bu;
  return (x ^ (x >> 16)) >= drop_below;
}

// Softmax scores are in units of log 2, because the hardware exponentiates to base 2. Every kernel multiplies the
// queries by scale and unit, so that all compute bitwise the same scores, and recomputed weights match the saved
// statistic.
template <bool sparse>
constexpr float kUnit = sparse ? 1.0f : kLog2e;

template <bool sparse>
__device__ __forceinline__ float weight(float score, float stat) {
  const float over = score - stat;
  if (!sparse) return fast_exp2(over);
  return over < 0.0f ? 0.0f : over > 1.0f ? 1.0f : over;  // fmaxf and fminf would hide a NaN
}

// The end of the keys that any of the owned queries may attend to.
__device__ __forceinline__ int keys_end(const Head& at, int owned) {
  const int last = min(at.row + owned, at.end_q) - 1;
  return at.row < at.end_q ? max(min(at.end_k, last + at.pair->offset + 1), 0) : 0;
}

}  // namespace mk::cross_attention
