// The LSTM scan's kernels: one launch for all steps of the forward and one for those of the backward, in fp32
// multiply-adds.
//
// A block owns a slice of the units of one group and some rows of its batch. A thread owns one unit of four rows for
// all steps: the four gates are 16 sums in registers, and the cell state's gradient also stays in registers. The
// block's slice of the weight, with the four gates of a unit next to each other, stays in shared memory for all steps
// if it fits; otherwise it is read through the L2 cache at every step. At every step the block stages the vectors that
// W is multiplied with (h of the previous time step, d of the next one), kDepth of them at a time. If one slice holds
// all units (H up to 96), blocks are independent and use block barriers. Several slices exchange h and d through global
// memory: the kernel is launched cooperatively, with a grid barrier in every step.
#pragma once

#include "../common/cuda/math.cuh"
#include "launch.cuh"

namespace mk::lstm_scan {

constexpr int kMostThreads = 512, kRowsOfThread = 4, kMostRows = 64;
constexpr int kDepth = 64;               // vectors staged at a time; a multiple of 4
constexpr int kStride = kMostRows + 4;   // floats per staged vector; keeps float4s aligned
#ifdef MI_CUDA_EMULATOR
constexpr int kWeights = 512;  // so small that tests' problems take the code path of large ones
#else
constexpr int kWeights = (kSharedLimit - 4 * kDepth * kStride) / 16;
#endif
constexpr int kShared = 4 * kDepth * kStride + 16 * kWeights;  // bytes

struct Slicing {
  int slices, units;     // slices of the hidden units, and units per slice
  int rows, row_slices;  // rows per block, and slices of a group's batch
  int first;             // row slice (counted over all groups) of the launch's first block
};

// The rows and the unit of a thread.
struct Place {
  int g, row, rows_end;  // the first of its four rows, and the end of the batch
  int unit, column;      // the unit's index in the layer, and in the slice
  int quad;              // which four of the block's rows it owns
  bool active;

  __device__ __forceinline__ Place(const Sizes& z, const Slicing& s) {
    const int slice = blockIdx.x % s.slices, rows = s.first + blockIdx.x / s.slices;
    g = rows / s.row_slices;
    column = threadIdx.x % s.units, quad = threadIdx.x / s.units;
    unit = slice * s.units + column;
    row = rows % s.row_slices * s.rows + quad * kRowsOfThread;
    rows_end = z.B;
    active = quad * kRowsOfThread < s.rows && unit < z.H;
  }
  __device__ __forceinline__ int first_unit() const { return unit - column; }
  __device__ __forceinline__ int block_row() const { return row - quad * kRowsOfThread; }
  __device__ __forceinline__ int64_t flat(const Sizes& z, int r) const { return static_cast<int64_t>(g) * z.B + row + r; }
  __device__ __forceinline__ bool has(int r) const { return active && row + r < rows_end; }
};

template <bool kCooperative>
__device__ __forceinline__ void step_barrier() {
  if constexpr (kCooperative) {
    grid_barrier();
  } else {
    __syncthreads();
  }
}

// Copies the block's slice of the weight to shared memory: [H, units].
__device__ __forceinline__ void stage_weight(float4* to, const float4* weight, const Place& p, const Sizes& z,
                                             const Slicing& s) {
  for (int i = threadIdx.x; i < z.H * s.units; i += blockDim.x) {
    const int k = i / s.units, unit = p.first_unit() + i % s.units;
    to[i] = unit < z.H ? weight[(static_cast<int64_t>(p.g) * z.H + k) * z.H + unit] : make_float4(0, 0, 0, 0);
  }
}

__device__ __forceinline__ void add_outer(float (&sum)[4][kRowsOfThread], float4 w, float4 v) {
  const float of_gate[4] = {w.x, w.y, w.z, w.w}, of_row[kRowsOfThread] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int q = 0; q < 4; ++q)
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) sum[q][r] += of_gate[q] * of_row[r];
}

template <bool kStaged, bool kCooperative>
__global__ __launch_bounds__(kMostThreads) void forward_kernel(Sizes z, Forward f, Slicing s) {
  float* vectors = shared_memory<float, kShared>();
  float4* own = reinterpret_cast<float4*>(vectors + kDepth * kStride);
  const float4* weight = reinterpret_cast<const float4*>(f.weight);
  const Place p(z, s);
  if constexpr (kStaged) stage_weight(own, weight, p, z, s);
  int length[kRowsOfThread];
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r) length[r] = !p.has(r) ? 0 : f.lengths ? static_cast<int>(f.lengths[p.flat(z, r)]) : z.T;

  for (int t = 0; t < z.T; ++t) {
    float given[4][kRowsOfThread] = {}, sum[4][kRowsOfThread] = {};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float bias = f.bias && p.active ? f.bias[(p.g * 4 + q) * z.H + p.unit] : 0.0f;
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) {
        const bool input = t < f.inputs && t < length[r];
        given[q][r] = bias + (input ? f.gates[((p.flat(z, r) * f.inputs + t) * 4 + q) * z.H + p.unit] : 0.0f);
      }
    }
    for (int k0 = 0; k0 < z.H && (t > 0 || f.h0); k0 += kDepth) {
      __syncthreads();
      for (int i = threadIdx.x; i < kDepth * s.rows; i += blockDim.x) {
        const int k = i % kDepth, r = i / kDepth, row = p.block_row() + r;
        const int64_t at = static_cast<int64_t>(p.g) * z.B + row;
        const bool there = k0 + k < z.H && row < z.B;
        const float* from = t > 0 ? f.h + (at * z.T + t - 1) * z.H : f.h0 + at * z.H;
        vectors[k * kStride + r] = there ? from[k0 + k] : 0.0f;
      }
      __syncthreads();
      const int end = p.active ? min(kDepth, z.H - k0) : 0;
#pragma unroll (kStaged ? 4 : 2)
      for (int k = 0; k < end; ++k) {
        const float4 w = kStaged ? own[(k0 + k) * s.units + p.column]
                                 : weight[(static_cast<int64_t>(p.g) * z.H + k0 + k) * z.H + p.unit];
        add_outer(sum, w, *reinterpret_cast<const float4*>(vectors + k * kStride + p.quad * kRowsOfThread));
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      if (!p.has(r)) continue;
      const int64_t at = (p.flat(z, r) * z.T + t) * z.H + p.unit;
      float a[4] = {}, c = 0.0f, h = 0.0f;
      if (t < length[r]) {
#pragma unroll
        for (int q = 0; q < 4; ++q) a[q] = q == 2 ? tanhf(sum[q][r] + given[q][r]) : sigmoid(sum[q][r] + given[q][r]);
        const float before = t > 0 ? f.c[at - z.H] : f.c0 ? f.c0[p.flat(z, r) * z.H + p.unit] : 0.0f;
        c = a[1] * before + a[0] * a[2];
        h = a[3] * tanhf(c);
      }
      f.c[at] = c, f.h[at] = h;
      if (f.activations)
#pragma unroll
        for (int q = 0; q < 4; ++q) f.activations[((p.flat(z, r) * z.T + t) * 4 + q) * z.H + p.unit] = a[q];
    }
    step_barrier<kCooperative>();
  }
}

template <bool kStaged, bool kCooperative>
__global__ __launch_bounds__(kMostThreads) void backward_kernel(Sizes z, Backward b, Slicing s) {
  float* vectors = shared_memory<float, kShared>();
  float4* own = reinterpret_cast<float4*>(vectors + kDepth * kStride);
  const float4* weight = reinterpret_cast<const float4*>(b.weight);
  const Place p(z, s);
  if constexpr (kStaged) stage_weight(own, weight, p, z, s);
  float dc[kRowsOfThread] = {};

  for (int t = z.T - 1; t >= (b.dh0 ? -1 : 0); --t) {
    float dh[kRowsOfThread] = {};
    for (int u0 = 0; u0 < z.H && t + 1 < z.T; u0 += kDepth / 4) {
      __syncthreads();
      for (int i = threadIdx.x; i < kDepth * s.rows; i += blockDim.x) {
        const int k = i % kDepth, r = i / kDepth, row = p.block_row() + r;  // k counts gates (outer) and units (inner)
        const int q = k / (kDepth / 4), u = u0 + k % (kDepth / 4);
        const int64_t at = (static_cast<int64_t>(p.g) * z.B + row) * z.T + t + 1;
        vectors[k * kStride + r] = u < z.H && row < z.B ? b.d[(at * 4 + q) * z.H + u] : 0.0f;
      }
      __syncthreads();
      const int end = p.active ? min(kDepth / 4, z.H - u0) : 0;
#pragma unroll 2
      for (int u = 0; u < end; ++u) {
        const float4 w = kStaged ? own[(u0 + u) * s.units + p.column]
                                 : weight[(static_cast<int64_t>(p.g) * z.H + u0 + u) * z.H + p.unit];
        const float of_gate[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float* d = vectors + (q * (kDepth / 4) + u) * kStride + p.quad * kRowsOfThread;
          const float4 v = *reinterpret_cast<const float4*>(d);
          dh[0] += of_gate[q] * v.x, dh[1] += of_gate[q] * v.y, dh[2] += of_gate[q] * v.z, dh[3] += of_gate[q] * v.w;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      if (!p.has(r)) continue;
      const int64_t row = p.flat(z, r);
      if (t < 0) {
        b.dh0[row * z.H + p.unit] = dh[r];
        continue;
      }
      const int64_t at = (row * z.T + t) * z.H + p.unit, wide = (row * z.T + t) * 4 * z.H + p.unit;
      float d[4] = {};
      if (!b.lengths || t < b.lengths[row]) {
        const float i = b.activations[wide], f = b.activations[wide + z.H], g = b.activations[wide + 2 * z.H],
                    o = b.activations[wide + 3 * z.H], squashed = tanhf(b.c[at]);
        const float before = t > 0 ? b.c[at - z.H] : b.c0 ? b.c0[row * z.H + p.unit] : 0.0f;
        const float slope = dh[r] + (b.g_h ? b.g_h[at] : 0.0f);
        const float total = dc[r] + (b.g_c ? b.g_c[at] : 0.0f) + slope * o * (1.0f - squashed * squashed);
        d[0] = total * g * i * (1.0f - i);
        d[1] = total * before * f * (1.0f - f);
        d[2] = total * i * (1.0f - g * g);
        d[3] = slope * squashed * o * (1.0f - o);
        dc[r] = total * f;
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) b.d[wide + q * z.H] = d[q];
    }
    step_barrier<kCooperative>();
  }
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r)
    if (b.dc0 && p.has(r)) b.dc0[p.flat(z, r) * z.H + p.unit] = dc[r];
}

}  // namespace mk::lstm_scan
