// Matrix tiles in shared memory and their products on tensor cores.
//
// A *panel* is a number of rows of 128 bytes of features (64 features in 16 bit, 32 in fp32). The eight 16-byte chunks
// of a row are permuted by an exclusive-or with the row's number, so that the eight rows of an ldmatrix lie in
// different banks. Counted in chunks, the fragments of m16n8k16 (16 bit) and m16n8k8 (TF32) are the same: k-step s uses
// chunks 2s and 2s + 1.
#pragma once

#include <type_traits>

#include "primitives.cuh"

namespace mk {

constexpr int kPanel = 128, kChunk = 16, kSteps = 4;  // bytes of a panel's row and of a chunk; k-steps of a panel

// Precision of a product: operands are stored as Element and multiplied in `terms` TF32 products (0: 16-bit operands).
struct InBf16 {
  using Element = bf16;
  static constexpr int terms = 0;
};
struct InFp16 {
  using Element = fp16;
  static constexpr int terms = 0;
};
struct InTf32 {
  using Element = float;
  static constexpr int terms = 1;
};
struct InFp32 {  // 3xTF32: the operands' rounding errors are multiplied too, to first order
  using Element = float;
  static constexpr int terms = 3;
};

template <class P>
constexpr int kPerPanel = kPanel / static_cast<int>(sizeof(typename P::Element));
// Unroll factor of loops over the k-steps of a panel. 3xTF32 is not unrolled: it splits its operands in registers, and
// none are free.
template <class P>
constexpr int kStepUnroll = P::terms == 3 ? 1 : kSteps;
template <class P>
constexpr int kPerChunk = kChunk / static_cast<int>(sizeof(typename P::Element));

__device__ __forceinline__ int panel_at(int row, int chunk) { return row * kPanel + ((chunk ^ (row & 7)) << 4); }

// Loads a panel [rows, kPerPanel] from a row-major [n, D] at (row, feature); elements outside are zero. With `aligned`
// (every row starts at a multiple of 16 bytes) the copy is asynchronous, and the caller commits and awaits it.
template <class P, int rows, int threads>
__device__ __forceinline__ void load_panel(unsigned char* panel, const typename P::Element* from, int row, int n,
                                           int feature, int D, bool aligned) {
  using E = typename P::Element;
  constexpr int per = kPerChunk<P>;
#pragma unroll 4
  for (int i = threadIdx.x; i < rows * 8; i += threads) {
    const int r = i / 8, c = i % 8, first = feature + c * per;
    const int valid = row + r < n ? min(max(D - first, 0), per) : 0;
    const E* source = valid ? from + static_cast<int64_t>(row + r) * D + first : from;
    unsigned char* to = panel + panel_at(r, c);
    if (aligned) {
      copy_async_16(to, source, valid * static_cast<int>(sizeof(E)));
    } else {
#pragma unroll
      for (int k = 0; k < per; ++k) reinterpret_cast<E*>(to)[k] = k < valid ? source[k] : E{};
    }
  }
}

// Loads the left operand of k-step `step`: 16 m rows, starting at `row`.
template <int m>
__device__ __forceinline__ void load_left(uint32_t (&a)[m][4], const unsigned char* panel, int row, int step, int lane) {
#pragma unroll
  for (int i = 0; i < m; ++i) ldmatrix_x4(a[i], panel + panel_at(row + 16 * i + lane % 16, 2 * step + lane / 16));
}

// Loads the right operand when k runs along its stored rows: the product's 8 n columns are the 8 n rows that start at
// `row`. n is even.
template <int n>
__device__ __forceinline__ void load_right(uint32_t (&b)[n][2], const unsigned char* panel, int row, int step, int lane) {
#pragma unroll
  for (int j = 0; j < n; j += 2) {
    uint32_t r[4];
    ldmatrix_x4(r, panel + panel_at(row + 8 * j + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
    b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
  }
}

// Loads the right operand when k runs down its stored rows: the k rows of `step`, and 8 n columns that start at feature
// `feature` (panels of `rows` rows follow one another). In fp32, k takes the order 0, 2, 4, 6, 1, 3, 5, 7 within a
// step, which avoids bank conflicts; the left operand must be written in the same order (store_left).
template <class P, int n>
__device__ __forceinline__ void load_right_down(uint32_t (&b)[n][2], const unsigned char* panels, int rows, int feature,
                                                int step, int lane) {
#pragma unroll
  for (int j = 0; j < n; j += P::terms ? 1 : 2) {
    const int f = feature + 8 * j;
    const unsigned char* panel = panels + f / kPerPanel<P> * rows * kPanel;
    if constexpr (P::terms == 0) {
      uint32_t r[4];
      ldmatrix_x4_transposed(r, panel + panel_at(16 * step + lane % 16, f % kPerPanel<P> / 8 + lane / 16));
      b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
    } else {
      const int k = 8 * step + lane % 4 * 2, column = f % kPerPanel<P> + lane / 4;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        b[j][h] = *reinterpret_cast<const uint32_t*>(panel + panel_at(k + h, column / 4) + column % 4 * 4);
    }
  }
}

// Writes elements (row, 2t) and (row, 2t + 1) of the n8 block at `column` of a left operand for load_right_down.
template <class P>
__device__ __forceinline__ void store_left(unsigned char* panel, int row, int column, int t, float low, float high) {
  if constexpr (P::terms == 0) {
    *reinterpret_cast<uint32_t*>(panel + panel_at(row, column / 8) + 4 * t) = pack<typename P::Element>(low, high);
  } else {
    *reinterpret_cast<float*>(panel + panel_at(row, column / 4) + 4 * t) = low;
    *reinterpret_cast<float*>(panel + panel_at(row, column / 4 + 1) + 4 * t) = high;
  }
}

// c += a b; a and b are consumed (rounded in place).
template <class P, int m, int n>
__device__ __forceinline__ void multiply(float (&c)[m][n][4], uint32_t (&a)[m][4], uint32_t (&b)[n][2]) {
  if constexpr (P::terms == 0) {
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
      for (int j = 0; j < n; ++j) mma_16x8x16<typename P::Element>(c[i][j], a[i], b[j]);
  } else {
    uint32_t a_low[m][4], b_low[n][2];
    auto split = [](uint32_t& high, uint32_t& low) {
      const float value = __uint_as_float(high);
      high = to_tf32(value);
      if constexpr (P::terms == 3) low = to_tf32(value - __uint_as_float(high));
    };
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) split(a[i][r], a_low[i][r]);
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) split(b[j][r], b_low[j][r]);
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if constexpr (P::terms == 3) {
          mma_16x8x8_tf32(c[i][j], a_low[i], b[j]);
          mma_16x8x8_tf32(c[i][j], a[i], b_low[j]);
        }
        mma_16x8x8_tf32(c[i][j], a[i], b[j]);
      }
  }
}

// c += left right^T over one panel's features.
template <class P, int unroll = kStepUnroll<P>, int m, int n>
__device__ __forceinline__ void multiply_panel(float (&c)[m][n][4], const unsigned char* left, int row,
                                               const unsigned char* right, int column, int lane) {
#pragma unroll(unroll)
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[m][4], b[n][2];
    load_left(a, left, row, step, lane);
    load_right(b, right, column, step, lane);
    multiply<P>(c, a, b);
  }
}

template <int m, int n>
__device__ __forceinline__ void clear(float (&c)[m][n][4]) {
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) c[i][j][r] = 0.0f;
}

}  // namespace mk
