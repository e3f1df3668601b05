// A concat critic on a CPU, for all groups, in tiles of R rows x C columns (64 pairs or a little less).
//
// With two hidden layers a tile is three products, M = 2 B N H1 H2 FLOPs each over all tiles:
//   forward   Z^T [H2, P] = W2 [H2, H1] H1^T [H1, P]            H1^T built from u and v^T, one tile at a time
//   backward  dW2 [H2, H1] += D^T [H2, P] H1 [P, H1]            H1 built from u and v, so nothing is transposed
//             dH1^T [H1, P] = W2^T [H1, H2] D^T [H2, P]
// where D is the gradient at the second layer. With ReLU the forward may keep one bit per pair and unit, and w is
// folded into W2^T: D^T is then g times the bits, dW2 = diag(w) P with P = sum D^T H1,
// dw = rowsum(W2 * P) + b2 * sum D, and the second layer's activations are not needed again. With other activations the
// backward recomputes Z.
// Work is split into items of rows. Each item has its own accumulators, which are summed in a fixed order.
#pragma once

#include <ATen/Parallel.h>

#include <type_traits>

#include "../common/buffer.h"
#include "../common/subnormals.h"
#include "scores.h"
#include "tile.h"

namespace mk::mlp_critic {

template <class T>
struct Inputs {  // own_weights: each group has its own parameters; otherwise all groups share them
  int64_t G, B, N, H1, H2;  // H2 = 0: one hidden layer
  const T *u, *v, *w2, *b2, *w, *b;
  bool own_weights;
  Act act;
  bool softplus_output, off_diagonal;
};

template <class T>
struct Outputs {  // null if not requested
  T *positive = nullptr, *row_lse = nullptr, *col_lse = nullptr, *row_sum = nullptr, *row_softplus = nullptr,
    *clipped = nullptr;
  T clip = 0;
};

template <class T>
struct Weights {  // gradients with respect to the statistics, and the log-sum-exps that they need; null if absent
  const T *positive = nullptr, *row = nullptr, *col = nullptr, *sum = nullptr, *soft = nullptr, *row_lse = nullptr,
          *col_lse = nullptr;
};

template <class T>
struct Gradients {
  T *u, *v, *w2 = nullptr, *b2 = nullptr, *w = nullptr, *b = nullptr;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T, class E>
class Problem {
  static constexpr bool kLow = !std::is_same_v<T, E>;

 public:
  explicit Problem(const Inputs<T>& inputs) : in(inputs) {
    column_tiles = ceil_div(in.N, kTilePairs);
    t.C = kColumnStep * ceil_div(ceil_div(in.N, column_tiles), kColumnStep);
    t.R = kTilePairs / t.C;
    t.P = t.R * t.C;
    row_tiles = ceil_div(in.B, t.R);
    w1_ = 32 * ceil_div(in.H1, 32);
    w2_ = in.H2 ? 32 * ceil_div(in.H2, 32) : 0;
    bits_ = in.act == Act::kRelu || in.act == Act::kLeakyRelu;
    // As few items as possible, because each has accumulators, but enough that all threads get equally many rows.
    const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    const int64_t least = ceil_div(threads, in.G);
    splits_ = least;
    for (int64_t s = least; s <= 2 * least; ++s)
      if (in.G * s % threads == 0) {
        splits_ = s;
        break;
      }
    splits_ = std::min(splits_, row_tiles);
    pack();
  }

  void forward(const Outputs<T>& out, T* kept_scores, uint32_t* kept_masks) {
    const int64_t items = in.G * splits_;
    if (in.H2) pack_left();
    Buffer<T> tops, totals;
    if (out.col_lse) {
      tops = make_buffer<T>(items * in.N), totals = make_zeros<T>(items * in.N);
      std::fill_n(tops.get(), items * in.N, minus_infinity<T>());
    }
    each_item([&](int64_t item, int64_t g, int64_t begin, int64_t end, Scratch& s) {
      T* top = out.col_lse ? tops.get() + item * in.N : nullptr;
      T* total = out.col_lse ? totals.get() + item * in.N : nullptr;
      for (int64_t i = begin; i < end; ++i) forward_rows(g, i, s, out, top, total, kept_scores, kept_masks);
    });
    if (!out.col_lse) return;
    for (int64_t g = 0; g < in.G; ++g) {
      T *top = tops.get() + g * splits_ * in.N, *total = totals.get() + g * splits_ * in.N;
      for (int64_t k = 1; k < splits_; ++k) add_to_columns(in.N, top + k * in.N, total + k * in.N, top, total);
      for (int64_t j = 0; j < in.N; ++j) out.col_lse[g * in.N + j] = top[j] + std::log(total[j]);
    }
  }

  void backward(const Weights<T>& weights, const T* kept_scores, const uint32_t* kept_masks, const Gradients<T>& out) {
    const int64_t items = in.G * splits_;
    const bool parameters = out.w != nullptr;
    if (in.H2 && !kept_masks) pack_left();
    if (in.H2) pack_back();
    Sums all{parameters ? w2_ * w1_ : 0, parameters ? std::max(w1_, w2_) : 0, column_tiles * w1_ * t.C};
    all.memory = make_buffer<T>(items * all.size());
    each_item([&](int64_t item, int64_t g, int64_t begin, int64_t end, Scratch& s) {
      std::fill_n(all.of(item).product, all.size(), T(0));
      s.col_lse = padded_columns(weights.col ? weights.col_lse + g * in.N : nullptr);
      s.col = padded_columns(weights.col ? weights.col + g * in.N : nullptr);
      for (int64_t i = begin; i < end; ++i)
        backward_rows(g, i, s, weights, kept_scores, kept_masks, all.of(item), out.u, parameters);
    });
    finish(all, out);
  }

  const Inputs<T> in;
  Shape t;
  int64_t row_tiles, column_tiles;

 private:
  struct Scratch {
    Buffer<E> columns, rows, d_rows, d_pairs;
    Buffer<T> z, dh, rowbuf, du, col_lse, col, unused;
    Buffer<uint32_t> masks;
  };

  struct Sums {  // layout of the items' accumulators, which lie next to each other
    int64_t product, width, dvt;
    Buffer<T> memory{};
    int64_t size() const { return product + 2 * width + 1 + dvt; }
    struct One {
      T *product, *d_bias, *d_w, *d_b, *dvt;
    };
    One of(int64_t item) const {
      T* base = memory.get() + item * size();
      return {base, base + product, base + product + width, base + product + 2 * width, base + product + 2 * width + 1};
    }
  };

  template <class F>
  void each_item(F&& f) {
    at::parallel_for(0, in.G * splits_, 1, [&](int64_t first, int64_t last) {
      const FlushSubnormals flush;
      Scratch s;
      s.z = make_buffer<T>(w2_ * t.P);
      for (int64_t item = first; item < last; ++item) {
        const int64_t g = item / splits_, k = item % splits_;
        f(item, g, row_tiles * k / splits_, row_tiles * (k + 1) / splits_, s);
      }
      release_gemm(kLow);
    });
  }

  // Visits units in blocks small enough that their tile stays in L1.
  static constexpr int64_t kUnits = 64;
  template <class F>
  static void each_block(int64_t width, F&& f) {
    for (int64_t first = 0; first < width; first += kUnits) f(first, std::min(kUnits, width - first));
  }

  const T* u_of(int64_t g, int64_t i) const { return u_.get() + (g * row_tiles + i) * t.R * w1_; }
  int64_t weights_of(int64_t g) const { return in.own_weights ? g : 0; }

  void pack() {
    const int64_t weight_groups = in.own_weights ? in.G : 1, columns = column_tiles * t.C;
    u_ = make_zeros<T>(in.G * row_tiles * t.R * w1_);
    v_ = make_zeros<T>(in.G * columns * w1_);
    vt_ = make_zeros<T>(in.G * columns * w1_);
    for (int64_t g = 0; g < in.G; ++g)
      for (int64_t i = 0; i < in.B; ++i)
        std::copy_n(in.u + (g * in.B + i) * in.H1, in.H1, u_.get() + (g * row_tiles * t.R + i) * w1_);
    at::parallel_for(0, in.G * column_tiles, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t g = block / column_tiles, j0 = block % column_tiles * t.C, n = std::min(t.C, in.N - j0);
        T *rows = v_.get() + block * t.C * w1_, *across = vt_.get() + block * t.C * w1_;
        for (int64_t j = 0; j < n; ++j) std::copy_n(in.v + (g * in.N + j0 + j) * in.H1, in.H1, rows + j * w1_);
        for (int64_t l = 0; l < in.H1; ++l)
          for (int64_t j = 0; j < n; ++j) across[l * t.C + j] = rows[j * w1_ + l];
      }
    });
    const int64_t last = in.H2 ? in.H2 : in.H1, width = in.H2 ? w2_ : w1_;
    w_ = make_zeros<T>(weight_groups * width);
    b2_ = make_zeros<T>(weight_groups * w2_);
    for (int64_t g = 0; g < weight_groups; ++g) {
      std::copy_n(in.w + g * last, last, w_.get() + g * width);
      if (in.H2) std::copy_n(in.b2 + g * in.H2, in.H2, b2_.get() + g * w2_);
    }
  }

  // W2 as the left operand of the forward. The caller's array is used directly if it needs no padding or rounding.
  void pack_left() {
    if (std::is_same_v<T, E> && w1_ == in.H1 && w2_ == in.H2) {
      left_operand_ = reinterpret_cast<const E*>(in.w2);
      return;
    }
    const int64_t weight_groups = in.own_weights ? in.G : 1;
    left_ = make_zeros<E>(weight_groups * w2_ * w1_);
    left_operand_ = left_.get();
    at::parallel_for(0, weight_groups * in.H2, 64, [&](int64_t first, int64_t end) {
      for (int64_t row = first; row < end; ++row) {
        E* out = left_.get() + (row / in.H2 * w2_ + row % in.H2) * w1_;
        if constexpr (kLow) {
          to_bf16(in.H1, in.w2 + row * in.H1, reinterpret_cast<uint16_t*>(out));
        } else {
          std::copy_n(in.w2 + row * in.H1, in.H1, out);
        }
      }
    });
  }

  // W2^T with w folded in, as the left operand of the backward.
  void pack_back() {
    const int64_t weight_groups = in.own_weights ? in.G : 1, blocks = w1_ / 16;
    back_ = make_zeros<E>(weight_groups * w2_ * w1_);
    at::parallel_for(0, weight_groups * blocks, 4, [&](int64_t first, int64_t end) {
      for (int64_t block = first; block < end; ++block) {
        const int64_t g = block / blocks, l0 = block % blocks * 16, n = std::min<int64_t>(16, in.H1 - l0);
        E* out = back_.get() + (g * w1_ + l0) * w2_;
        for (int64_t k = 0; k < in.H2; ++k) {
          const T fold = bits_ ? in.w[g * in.H2 + k] : T(1);
          const T* weight = in.w2 + (g * in.H2 + k) * in.H1 + l0;
          for (int64_t l = 0; l < n; ++l) out[l * w2_ + k] = static_cast<E>(fold * weight[l]);
        }
      }
    });
  }

  // Scores [P] of tile (i, j) before the output activation; also stores the masks or z that the backward needs.
  void tile_scores(int64_t g, int64_t i, int64_t j, Scratch& s, uint32_t* masks, T* score) {
    const int64_t own = weights_of(g);
    const T *u = u_of(g, i), *vt = vt_.get() + (g * column_tiles + j) * t.C * w1_;
    std::fill_n(score, t.P, in.b[own]);
    if (!in.H2) return single_layer(in.act, w1_, t, u, vt, w_.get() + own * w1_, score);
    if (!s.columns) s.columns = make_buffer<E>(w1_ * t.P);
    hidden_columns(in.act, w1_, t, u, vt, s.columns.get());
    each_block(w2_, [&](int64_t k, int64_t n) {
      T* z = s.z.get() + (bits_ ? 0 : k * t.P);  // z is kept only for smooth activations, whose backward needs it
      gemm(n, t.P, w1_, w1_, t.P, t.P, false, left_operand_ + (own * w2_ + k) * w1_, s.columns.get(), z);
      second_layer(in.act, n, t, z, b2_.get() + own * w2_ + k, w_.get() + own * w2_ + k, score,
                   masks ? masks + k / 32 * t.P : nullptr);
    });
  }

  void forward_rows(int64_t g, int64_t i, Scratch& s, const Outputs<T>& out, T* top, T* total, T* kept_scores,
                    uint32_t* kept_masks) {
    const int64_t length = column_tiles * t.C;
    if (!s.rowbuf) s.rowbuf = make_buffer<T>(t.R * length + t.P);
    T *rowbuf = s.rowbuf.get(), *score = rowbuf + t.R * length;
    for (int64_t j = 0; j < column_tiles; ++j) {
      const int64_t tile = (g * row_tiles + i) * column_tiles + j;
      tile_scores(g, i, j, s, kept_masks ? kept_masks + tile * w2_ / 32 * t.P : nullptr, score);
      if (kept_scores) std::copy_n(score, t.P, kept_scores + tile * t.P);
      if (in.softplus_output) softplus_all(t.P, score, score);
      for (int64_t r = 0; r < t.R; ++r) std::copy_n(score + r * t.C, t.C, rowbuf + r * length + j * t.C);
    }
    for (int64_t r = 0; r < std::min(t.R, in.B - i * t.R); ++r)
      row_statistics(g * in.B, i * t.R + r, rowbuf + r * length, out, top, total);
  }

  void row_statistics(int64_t offset, int64_t i, T* s, const Outputs<T>& out, T* top, T* total) {
    const int64_t at = offset + i;
    if (out.positive) out.positive[at] = s[i];
    if (in.off_diagonal) s[i] = T(0);
    out.row_sum[at] = sum(in.N, s);
    if (in.off_diagonal) s[i] = minus_infinity<T>();
    const T all = -minus_infinity<T>();
    if (out.row_lse) out.row_lse[at] = log_sum_exp(in.N, s, -all, all);
    if (out.row_softplus) out.row_softplus[at] = softplus_sum(in.N, s);
    if (out.clipped) out.clipped[at] = log_sum_exp(in.N, s, -out.clip, out.clip);
    if (top) add_to_columns(in.N, s, static_cast<const T*>(nullptr), top, total);
  }

  Buffer<T> padded_columns(const T* values) const {
    if (!values) return nullptr;
    auto out = make_zeros<T>(column_tiles * t.C);
    std::copy_n(values, in.N, out.get());
    return out;
  }

  // dL / dscore, g [P], of tile (i, j) from its scores before the output activation.
  void score_gradient(int64_t group, int64_t i, int64_t j, const Scratch& s, const Weights<T>& w, const T* raw, T* g) {
    T scores[kTilePairs];
    if (in.softplus_output) {
      softplus_all(t.P, raw, scores);
    } else {
      std::copy_n(raw, t.P, scores);
    }
    const int64_t j0 = j * t.C, n = std::min(t.C, in.N - j0);
    std::fill_n(g, t.P, T(0));
    for (int64_t r = 0; r < std::min(t.R, in.B - i * t.R); ++r) {
      const int64_t row = i * t.R + r, at = group * in.B + row, diagonal = row - j0;
      T* out = g + r * t.C;
      if (w.sum) std::fill_n(out, n, w.sum[at]);
      add_gradient(n, scores + r * t.C, w.row ? w.row[at] : T(0), w.row ? w.row_lse[at] : T(0),
                   s.col ? s.col.get() + j0 : nullptr, s.col ? s.col_lse.get() + j0 : nullptr,
                   w.soft ? w.soft[at] : T(0), out);
      if (diagonal < 0 || diagonal >= n) continue;
      if (in.off_diagonal) out[diagonal] = T(0);
      if (w.positive) out[diagonal] += w.positive[at];
    }
    if (in.softplus_output) times_sigmoid(t.P, raw, g);
  }

  void backward_rows(int64_t g, int64_t i, Scratch& s, const Weights<T>& weights, const T* kept_scores,
                     const uint32_t* kept_masks, typename Sums::One sums, T* du, bool parameters) {
    if (!s.du) s.du = make_buffer<T>(t.R * w1_);
    std::fill_n(s.du.get(), t.R * w1_, T(0));
    for (int64_t j = 0; j < column_tiles; ++j) {
      T score[kTilePairs], gradient[kTilePairs];
      const int64_t tile = (g * row_tiles + i) * column_tiles + j;
      const uint32_t* masks = nullptr;
      if (kept_masks) {
        std::copy_n(kept_scores + tile * t.P, t.P, score);
        masks = kept_masks + tile * w2_ / 32 * t.P;
      } else {
        if (bits_ && in.H2 && !s.masks) s.masks = make_buffer<uint32_t>(w2_ / 32 * t.P);
        tile_scores(g, i, j, s, s.masks.get(), score);
        masks = s.masks.get();
      }
      score_gradient(g, i, j, s, weights, score, gradient);
      if (parameters) *sums.d_b += sum(t.P, gradient);
      tile_backward(g, i, j, s, masks, gradient, sums, parameters);
    }
    const T* w = w_.get() + weights_of(g) * w1_;
    for (int64_t r = 0; r < std::min(t.R, in.B - i * t.R); ++r)
      for (int64_t l = 0; l < in.H1; ++l)
        du[(g * in.B + i * t.R + r) * in.H1 + l] = s.du[r * w1_ + l] * (in.H2 ? T(1) : w[l]);
  }

  void tile_backward(int64_t g, int64_t i, int64_t j, Scratch& s, const uint32_t* masks, const T* gradient,
                     typename Sums::One sums, bool parameters) {
    const int64_t own = weights_of(g), block = (g * column_tiles + j) * t.C * w1_;
    const T *u = u_of(g, i), *v = v_.get() + block, *vt = vt_.get() + block;
    T* dvt = sums.dvt + j * w1_ * t.C;  // [C][width] with one hidden layer
    if (!s.rows) {
      s.rows = make_buffer<E>(kUnits * t.P), s.dh = make_buffer<T>(kUnits * t.P), s.d_rows = make_buffer<E>(w2_ * t.P);
      if constexpr (kLow) s.d_pairs = make_buffer<E>(w2_ * t.P);
      s.unused = make_zeros<T>(2 * std::max(w1_, w2_));
    }
    T *d_bias = parameters ? sums.d_bias : s.unused.get(), *d_w = parameters ? sums.d_w : s.unused.get() + w2_;
    if (!in.H2) {
      single_layer_gradient(in.act, w1_, t, u, v, gradient, s.du.get(), dvt, d_w);
      return;
    }
    if (bits_) {
      const T* operand = gradient;
      T rounded[kTilePairs];
      if constexpr (kLow) {
        round_fairly(t, i * t.R, j * t.C, gradient, rounded);
        operand = rounded;
      }
      masked_gradient(in.act, w2_, t, masks, gradient, operand, s.d_rows.get(), s.d_pairs.get(), d_bias);
    } else {
      smooth_gradient(in.act, w2_, t, s.z.get(), b2_.get() + own * w2_, w_.get() + own * w2_, gradient, s.d_rows.get(),
                      s.d_pairs.get(), d_w, d_bias);
    }
    const E* right = kLow ? s.d_pairs.get() : s.d_rows.get();
    each_block(w1_, [&](int64_t l, int64_t n) {
      if (parameters) {
        hidden_rows(in.act, n, w1_, t, u + l, v + l, s.rows.get());
        gemm(w2_, n, t.P, t.P, n, w1_, true, s.d_rows.get(), s.rows.get(), sums.product + l);
      }
      gemm(n, t.P, w2_, w2_, t.P, t.P, false, back_.get() + (own * w1_ + l) * w2_, right, s.dh.get());
      first_layer_gradient(in.act, n, w1_, t, u + l, vt + l * t.C, s.dh.get(), s.du.get() + l, dvt + l * t.C);
    });
  }

  void finish(const Sums& all, const Gradients<T>& out) {
    at::parallel_for(0, in.G * column_tiles, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t g = block / column_tiles, j = block % column_tiles, n = std::min(t.C, in.N - j * t.C);
        T* dv = out.v + (g * in.N + j * t.C) * in.H1;
        const T* w = w_.get() + weights_of(g) * w1_;
        for (int64_t k = 0; k < splits_; ++k) {
          const T* part = all.of(g * splits_ + k).dvt + j * w1_ * t.C;
          for (int64_t c = 0; c < n; ++c)
            for (int64_t l = 0; l < in.H1; ++l) {
              const T d = in.H2 ? part[l * t.C + c] : part[c * w1_ + l] * w[l];
              dv[c * in.H1 + l] = (k ? dv[c * in.H1 + l] : T(0)) + d;
            }
        }
      }
    });
    if (!out.w) return;
    const int64_t weight_groups = in.own_weights ? in.G : 1, items = in.G * splits_ / weight_groups;
    const int64_t rows = in.H2 ? in.H2 : 1;
    at::parallel_for(0, weight_groups * rows, 32, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) finish_unit(all, row / rows, row % rows, items, out);
    });
  }

  // With two hidden layers: writes the gradients of unit k's parameters, and for k = 0 that of b. With one hidden
  // layer: writes all parameters' gradients (k is 0).
  void finish_unit(const Sums& all, int64_t g, int64_t k, int64_t items, const Gradients<T>& out) const {
    auto total = [&](auto part) {
      T sum = T(0);
      for (int64_t m = 0; m < items; ++m) sum += part(all.of(g * items + m));
      return sum;
    };
    if (k == 0) out.b[g] = total([](auto one) { return *one.d_b; });
    if (!in.H2) {
      for (int64_t l = 0; l < in.H1; ++l) out.w[g * in.H1 + l] = total([l](auto one) { return one.d_w[l]; });
      return;
    }
    const int64_t row = g * in.H2 + k;
    const T fold = bits_ ? in.w[row] : T(1), bias = total([k](auto one) { return one.d_bias[k]; });
    T* product = out.w2 + row * in.H1;
    for (int64_t m = 0; m < items; ++m) take_in(in.H1, all.of(g * items + m).product + k * w1_, m > 0, product);
    const T moved = dot_and_scale(in.H1, in.w2 + row * in.H1, fold, product);
    out.b2[row] = fold * bias;
    out.w[row] = bits_ ? moved + in.b2[row] * bias : total([k](auto one) { return one.d_w[k]; });
  }

  int64_t w1_, w2_, splits_;
  bool bits_;
  Buffer<T> u_, v_, vt_, w_, b2_;
  Buffer<E> left_, back_;
  const E* left_operand_ = nullptr;
};

}  // namespace mk::mlp_critic
