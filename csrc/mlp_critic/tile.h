// Elementwise steps around the matrix products of an MLP critic's tile. A tile has R rows x C columns = P pairs, and
// the pairs lie along the vector lanes.
//
// A hidden unit's values over the tile are one row of P numbers, so that activations, ReLU bits (bit k % 32 of
// masks[k / 32][pair]), the score and every gradient are elementwise over lanes. u [R][width] and v [C][width] (vt is
// its transpose, [width][C]) are the two halves of the first layer. E is the type of the products' operands: T, or
// BFloat16 in pairs along the product's inner dimension (VNNI).
#pragma once

#include <algorithm>

#include "../common/gemm.h"
#include "activation.h"

namespace mk::mlp_critic {

struct Shape {
  int64_t R, C, P;  // P = R C
};

namespace body {

// out [width][P] = act(u + v); in bf16, [width / 2][P] VNNI pairs.
template <Act A, class T, class E>
MK_INLINE void hidden_columns(int64_t width, Shape t, const T* u, const T* vt, E* out) {
  for (int64_t r = 0; r < t.R; ++r) {
    const T* a = u + r * width;
    if constexpr (std::is_same_v<T, E>) {
      for (int64_t l = 0; l < width; ++l)
        for (int64_t c = 0; c < t.C; ++c) out[l * t.P + r * t.C + c] = activate<A>(a[l] + vt[l * t.C + c]);
    } else {
      auto* pairs = reinterpret_cast<uint32_t*>(out);
      for (int64_t l = 0; l < width; l += 2)
        for (int64_t c = 0; c < t.C; ++c)
          pairs[l / 2 * t.P + r * t.C + c] =
              bf16_pair(activate<A>(a[l] + vt[l * t.C + c]), activate<A>(a[l + 1] + vt[(l + 1) * t.C + c]));
    }
  }
}

// out [P][n] = act(u + v) for n of the `width` units; in bf16, [P / 2][n] VNNI pairs.
template <Act A, class T, class E>
MK_INLINE void hidden_rows(int64_t n, int64_t width, Shape t, const T* u, const T* v, E* out) {
  for (int64_t r = 0; r < t.R; ++r) {
    const T* a = u + r * width;
    if constexpr (std::is_same_v<T, E>) {
      for (int64_t c = 0; c < t.C; ++c)
        for (int64_t l = 0; l < n; ++l) out[(r * t.C + c) * n + l] = activate<A>(a[l] + v[c * width + l]);
    } else {
      auto* pairs = reinterpret_cast<uint32_t*>(out);
      for (int64_t c = 0; c < t.C; c += 2)
        for (int64_t l = 0; l < n; ++l)
          pairs[(r * t.C + c) / 2 * n + l] =
              bf16_pair(activate<A>(a[l] + v[c * width + l]), activate<A>(a[l] + v[(c + 1) * width + l]));
    }
  }
}

// score[p] += sum_k w_k act(z[k][p] + b_k); `masks`, if given, receives the bits z + b > 0.
template <Act A, class T>
MK_INLINE void second_layer(int64_t width, Shape t, const T* z, const T* bias, const T* w, T* score, uint32_t* masks) {
  if constexpr (A == Act::kRelu || A == Act::kLeakyRelu) {
    if (masks) std::fill_n(masks, width / 32 * t.P, 0u);
  }
  for (int64_t k = 0; k < width; ++k) {
    const T b = bias[k], weight = w[k];
    const T* row = z + k * t.P;
    for (int64_t p = 0; p < t.P; ++p) score[p] += weight * activate<A>(row[p] + b);
    if constexpr (A == Act::kRelu || A == Act::kLeakyRelu) {
      if (!masks) continue;
      uint32_t* m = masks + k / 32 * t.P;
      const uint32_t bit = 1u << (k % 32);
      for (int64_t p = 0; p < t.P; ++p) m[p] |= row[p] + b <= T(0) ? 0u : bit;
    }
  }
}

// Stores unit k's gradient d as a row of a left operand and, in bf16, also (after every second unit) as VNNI pairs of a
// right operand.
template <class T, class E>
MK_INLINE void put_gradient(int64_t k, int64_t P, const T* d, const T* before, E* rows, E* pairs) {
  if constexpr (std::is_same_v<T, E>) {
    (void)before, (void)pairs;
    for (int64_t p = 0; p < P; ++p) rows[k * P + p] = d[p];
  } else {
    auto* bits = reinterpret_cast<uint16_t*>(rows) + k * P;
    for (int64_t p = 0; p < P; ++p) bits[p] = bf16_bits(d[p]);
    if (k % 2 == 0) return;
    auto* out = reinterpret_cast<uint32_t*>(pairs) + k / 2 * P;
    for (int64_t p = 0; p < P; ++p) out[p] = bf16_pair(before[p], d[p]);
  }
}

// d[k][p] = operand_p act'_kp and d_bias[k] += sum_p g_p act'_kp, where the bits give act'. `operand` is g, rounded if
// the products are in bf16.
template <Act A, class T, class E>
MK_INLINE void masked_gradient(int64_t width, Shape t, const uint32_t* masks, const T* g, const T* operand, E* rows,
                               E* pairs, T* d_bias) {
  T d[2][kTilePairs], flat[kTilePairs], low[kTilePairs];
  for (int64_t p = 0; p < t.P; ++p) low[p] = A == Act::kRelu ? T(0) : g[p] * T(0.01);
  for (int64_t p = 0; p < t.P; ++p) flat[p] = A == Act::kRelu ? T(0) : operand[p] * T(0.01);
  for (int64_t k = 0; k < width; ++k) {
    const uint32_t* m = masks + k / 32 * t.P;
    const uint32_t bit = 1u << (k % 32);
    T* now = d[k & 1];
    T total = T(0);
#pragma omp simd reduction(+ : total)
    for (int64_t p = 0; p < t.P; ++p) {
      now[p] = m[p] & bit ? operand[p] : flat[p];
      if constexpr (std::is_same_v<T, E>) {
        total += now[p];
      } else {
        total += m[p] & bit ? g[p] : low[p];
      }
    }
    d_bias[k] += total;
    put_gradient(k, t.P, now, d[~k & 1], rows, pairs);
  }
}

// d[k][p] = g_p w_k act'(z + b); d_w[k] += sum_p g act(z + b), d_bias[k] += sum_p d.
template <Act A, class T, class E>
MK_INLINE void smooth_gradient(int64_t width, Shape t, const T* z, const T* bias, const T* w, const T* g, E* rows,
                               E* pairs, T* d_w, T* d_bias) {
  T d[2][kTilePairs];
  for (int64_t k = 0; k < width; ++k) {
    const T b = bias[k], weight = w[k];
    const T* row = z + k * t.P;
    T* now = d[k & 1];
    T total = T(0), moved = T(0);
#pragma omp simd reduction(+ : total, moved)
    for (int64_t p = 0; p < t.P; ++p) {
      const T x = row[p] + b;
      now[p] = g[p] * weight * slope<A>(x);
      total += now[p];
      moved += g[p] * activate<A>(x);
    }
    d_bias[k] += total;
    d_w[k] += moved;
    put_gradient(k, t.P, now, d[~k & 1], rows, pairs);
  }
}

// du[r][l] += sum_c dh act'(u + v), dvt[l][c] += sum_r dh act'(u + v).
template <Act A, class T>
MK_INLINE void first_layer_gradient(int64_t n, int64_t width, Shape t, const T* u, const T* vt, const T* dh, T* du, T* dvt) {
  for (int64_t l = 0; l < n; ++l)
    for (int64_t r = 0; r < t.R; ++r) {
      const T a = u[r * width + l];
      const T* in = dh + l * t.P + r * t.C;
      T* out = dvt + l * t.C;
      T total = T(0);
#pragma omp simd reduction(+ : total)
      for (int64_t c = 0; c < t.C; ++c) {
        const T d = in[c] * slope<A>(a + vt[l * t.C + c]);
        out[c] += d;
        total += d;
      }
      du[r * width + l] += total;
    }
}

// One hidden layer: score[p] += sum_l w_l act(u + v).
template <Act A, class T>
MK_INLINE void single_layer(int64_t width, Shape t, const T* u, const T* vt, const T* w, T* score) {
  for (int64_t r = 0; r < t.R; ++r) {
    T s[kTilePairs];
    for (int64_t c = 0; c < t.C; ++c) s[c] = score[r * t.C + c];
    for (int64_t l = 0; l < width; ++l) {
      const T a = u[r * width + l], weight = w[l];
      for (int64_t c = 0; c < t.C; ++c) s[c] += weight * activate<A>(a + vt[l * t.C + c]);
    }
    for (int64_t c = 0; c < t.C; ++c) score[r * t.C + c] = s[c];
  }
}

// The gradient of single_layer without the factor w_l: with d = g act'(u + v), du[r][l] += sum_c d, dv[c][l] += sum_r d
// and d_w[l] += sum g act(u + v). Units lie along the lanes, so that no sum crosses lanes; v and dv are [C][width].
template <Act A, class T>
MK_INLINE void single_layer_gradient(int64_t width, Shape t, const T* u, const T* v, const T* g, T* du, T* dv, T* d_w) {
  for (int64_t r = 0; r < t.R; ++r) {
    const T* a = u + r * width;
    T* da = du + r * width;
    for (int64_t c = 0; c < t.C; ++c) {
      const T weight = g[r * t.C + c];
      const T* b = v + c * width;
      T* db = dv + c * width;
#pragma GCC ivdep
      for (int64_t l = 0; l < width; ++l) {
        const T x = a[l] + b[l];
        const T d = weight * slope<A>(x);
        da[l] += d;
        db[l] += d;
        d_w[l] += weight * activate<A>(x);
      }
    }
  }
}

}  // namespace body

#define MK_EACH_ACTIVATION(function, ...)                                             \
  switch (act) {                                                                      \
    case Act::kRelu: return body::function<Act::kRelu>(__VA_ARGS__);                  \
    case Act::kLeakyRelu: return body::function<Act::kLeakyRelu>(__VA_ARGS__);        \
    case Act::kTanh: return body::function<Act::kTanh>(__VA_ARGS__);                  \
    case Act::kSigmoid: return body::function<Act::kSigmoid>(__VA_ARGS__);            \
    case Act::kElu: return body::function<Act::kElu>(__VA_ARGS__);                    \
    case Act::kGelu: return body::function<Act::kGelu>(__VA_ARGS__);                  \
    case Act::kSilu: return body::function<Act::kSilu>(__VA_ARGS__);                  \
  }

// Functions that read or write operands of the products, for each T and E.
#define MK_OPERAND_FUNCTIONS(T, E)                                                                                     \
  [[maybe_unused]] MK_CLONES static void hidden_columns(Act act, int64_t n, Shape t, const T* u, const T* vt, E* h) {  \
    MK_EACH_ACTIVATION(hidden_columns, n, t, u, vt, h)                                                                 \
  }                                                                                                                    \
  [[maybe_unused]] MK_CLONES static void hidden_rows(Act act, int64_t n, int64_t width, Shape t, const T* u,           \
                                                     const T* v, E* h) {                                               \
    MK_EACH_ACTIVATION(hidden_rows, n, width, t, u, v, h)                                                              \
  }                                                                                                                    \
  [[maybe_unused]] MK_CLONES static void masked_gradient(Act act, int64_t n, Shape t, const uint32_t* m, const T* g,   \
                                                         const T* operand, E* rows, E* pairs, T* d_bias) {             \
    if (act == Act::kRelu) return body::masked_gradient<Act::kRelu>(n, t, m, g, operand, rows, pairs, d_bias);         \
    body::masked_gradient<Act::kLeakyRelu>(n, t, m, g, operand, rows, pairs, d_bias);                                  \
  }                                                                                                                    \
  [[maybe_unused]] MK_CLONES static void smooth_gradient(Act act, int64_t n, Shape t, const T* z, const T* b,          \
                                                         const T* w, const T* g, E* rows, E* pairs, T* d_w,            \
                                                         T* d_bias) {                                                  \
    MK_EACH_ACTIVATION(smooth_gradient, n, t, z, b, w, g, rows, pairs, d_w, d_bias)                                    \
  }
MK_OPERAND_FUNCTIONS(float, float)
MK_OPERAND_FUNCTIONS(float, c10::BFloat16)
MK_OPERAND_FUNCTIONS(double, double)
#undef MK_OPERAND_FUNCTIONS

// Rounds g to bf16 so that the error is 0 on average. Score gradients are nearly equal over a batch; if they were
// rounded to nearest, all would err in the same direction and so would their sums. A low-discrepancy sequence of the
// row and column decides which elements are rounded up, so that runs are reproducible and errors along a row cancel.
[[maybe_unused]] MK_CLONES static void round_fairly(Shape t, int64_t row, int64_t column, const float* g, float* out) {
  for (int64_t r = 0; r < t.R; ++r)
    for (int64_t c = 0; c < t.C; ++c) {
      const uint32_t i = static_cast<uint32_t>(row + r), j = static_cast<uint32_t>(column + c);
      const uint32_t chance = (i * 0xc13fa9a9u + j * 0x91e10da5u) >> 16;
      uint32_t bits;
      std::memcpy(&bits, g + r * t.C + c, 4);
      bits = (bits + chance) & 0xffff0000u;
      std::memcpy(out + r * t.C + c, &bits, 4);
    }
}

#define MK_TILE_FUNCTIONS(T)                                                                                           \
  [[maybe_unused]] MK_CLONES static void second_layer(Act act, int64_t n, Shape t, const T* z, const T* b, const T* w, \
                                                      T* score, uint32_t* masks) {                                     \
    MK_EACH_ACTIVATION(second_layer, n, t, z, b, w, score, masks)                                                      \
  }                                                                                                                    \
  [[maybe_unused]] MK_CLONES static void first_layer_gradient(Act act, int64_t n, int64_t width, Shape t, const T* u,  \
                                                              const T* vt, const T* dh, T* du, T* dvt) {               \
    MK_EACH_ACTIVATION(first_layer_gradient, n, width, t, u, vt, dh, du, dvt)                                          \
  }                                                                                                                    \
  [[maybe_unused]] MK_CLONES static void single_layer(Act act, int64_t n, Shape t, const T* u, const T* vt,            \
                                                      const T* w, T* score) {                                          \
    MK_EACH_ACTIVATION(single_layer, n, t, u, vt, w, score)                                                            \
  }                                                                                                                    \
  [[maybe_unused]] MK_CLONES static void single_layer_gradient(Act act, int64_t n, Shape t, const T* u, const T* v,    \
                                                               const T* g, T* du, T* dv, T* d_w) {                     \
    MK_EACH_ACTIVATION(single_layer_gradient, n, t, u, v, g, du, dv, d_w)                                              \
  }
MK_TILE_FUNCTIONS(float)
MK_TILE_FUNCTIONS(double)
#undef MK_TILE_FUNCTIONS
#undef MK_EACH_ACTIVATION

}  // namespace mk::mlp_critic
