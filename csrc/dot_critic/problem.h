// One group of a dot critic on a CPU: S = scale x y^T + a + b, computed in panels of rows.
//
// y is packed twice, as the right operand of S (y^T) and of dx (y); each panel of x is packed once. A tile of S is
// computed by brgemm, used while it is in L1 or L2, and never written out. dx is accumulated per panel; dy is
// accumulated per thread, transposed, and summed in a fixed order. E is the type of the tiles' operands: T, or BFloat16
// with T = float accumulation.
#pragma once

#include <ATen/Parallel.h>

#include <array>
#include <type_traits>
#include <vector>

#include "../common/buffer.h"
#include "../common/gemm.h"
#include "../common/rows.h"
#include "../common/subnormals.h"
#include "schema.h"
#include "tile.h"

namespace mk::dot_critic {

template <class T>
struct Group {
  int64_t B, N, D;
  const T *x, *y;
  T scale;
  const T *row_bias, *col_bias;
  const int64_t *row_ids, *col_ids;
  int64_t pairs, positive_shift;
  int64_t positive(int64_t i) const { return positive_shift < 0 ? -1 : (i + positive_shift) % N; }
};

template <class T>
struct Weights {  // of the terms of dS; a null pointer means that a term is absent
  const T *row_lse = nullptr, *g_row = nullptr, *col_lse = nullptr, *g_col = nullptr, *g_soft = nullptr,
          *g_pos = nullptr;
  bool soft_signed = false;
};

template <class T>
struct Gradients {
  T *x = nullptr, *y = nullptr, *scale = nullptr, *row_bias = nullptr, *col_bias = nullptr;
  // 1 / norm of the rows before they were normalised. If given, the gradients are those of the unnormalised rows.
  const T *x_inverse = nullptr, *y_inverse = nullptr;
};

template <class T>
constexpr T kUnclipped = std::numeric_limits<T>::infinity();

template <class T, class E>
class Problem {
  static constexpr bool kLow = !std::is_same_v<T, E>;

 public:
  Problem(const Group<T>& group, int64_t threads, int64_t needs)
      : g(group),
        needs_(needs),
        blocks_((g.N + kBlock - 1) / kBlock),
        dblocks_((g.D + kBlock - 1) / kBlock),
        depth_(kLow ? (g.D + 1) / 2 * 2 : g.D) {
    const int64_t rows = panel_rows();
    const int64_t want = std::max<int64_t>((g.B + rows - 1) / rows, std::min<int64_t>(threads, (g.B + 15) / 16));
    const int64_t even = (want + threads - 1) / threads * threads;
    panels_ = want > threads ? std::min(even, (g.B + 7) / 8) : want;
    m_ = ((g.B + panels_ - 1) / panels_ + 7) / 8 * 8;
    panels_ = (g.B + m_ - 1) / m_;
    threads_ = std::max<int64_t>(1, std::min(threads, panels_));
    scratch_.resize(threads_);
    pack_columns();
  }

  // Computes (top, sum) pairs of the row and column log-sum-exps, and softplus sums; null outputs are skipped.
  // `clip` bounds the scores that enter the log-sum-exps; with `stored` it must be kUnclipped.
  void statistics(T* row_top, T* row_sum, T* col_top, T* col_sum, T* soft, bool soft_signed, T clip, T* stored,
                  T* positive_score) {
    const int64_t width = blocks_ * kBlock;
    Buffer<T> tops = make_buffer<T>(col_top ? threads_ * width : 0), sums = make_buffer<T>(col_top ? threads_ * width : 0);
    if (col_top) std::fill_n(tops.get(), threads_ * width, minus_infinity<T>());
    if (col_top) std::fill_n(sums.get(), threads_ * width, T(0));
    for_panels([&](int64_t thread, int64_t p, Scratch& w) {
      const int64_t rows = rows_of(p);
      pack_rows(p, w);
      std::vector<T> top(m_, minus_infinity<T>()), sum(m_, T(0)), before(m_), safe(m_), factor(m_), total(m_, T(0));
      for (int64_t b = 0; b < blocks_; ++b) {
        T* s = stored ? stored + (p * blocks_ + b) * m_ * kBlock : w.scores.get();
        scores(p, b, w, s);
        if (positive_score) read_positives(p, b, s, positive_score);
        if (soft) {
          if (soft_signed) flip_positives(p, b, s);
          tile::softplus_rows(rows, s, total.data());
          if (soft_signed) flip_positives(p, b, s);
        }
        if (!row_top && !col_top) continue;
        if (clip < kUnclipped<T>) tile::clip_scores(rows, s, clip);
        before = top;
        tile::row_max(rows, s, top.data());
        T hi = minus_infinity<T>();
        for (int64_t i = 0; i < rows; ++i) {
          safe[i] = top[i] == minus_infinity<T>() ? T(0) : top[i];
          if (before[i] != top[i]) sum[i] *= fast_exp(before[i] - safe[i]);
          hi = std::max(hi, top[i]);
        }
        tile::exp_rows(rows, s, w.exps.get(), safe.data(), sum.data());
        if (!col_top) continue;
        T part[kBlock], ref[kBlock];
        for (int64_t i = 0; i < rows; ++i) factor[i] = fast_exp(top[i] - (hi == minus_infinity<T>() ? T(0) : hi));
        tile::weighted_columns(rows, w.exps.get(), factor.data(), part);
        const int64_t valid = std::min(kBlock, g.N - b * kBlock);
        std::fill_n(ref, kBlock, hi);
        // A column whose scores are far below the panel's largest would lose precision or underflow: sum its
        // exponentials relative to the column's own maximum.
        if (*std::min_element(part, part + valid) < T(1e-20)) tile::exact_columns(rows, s, ref, part);
        tile::merge(kBlock, tops.get() + thread * width + b * kBlock, sums.get() + thread * width + b * kBlock, ref, part);
      }
      const int64_t first = p * m_;
      if (row_top) std::copy_n(top.data(), rows, row_top + first);
      if (row_top) std::copy_n(sum.data(), rows, row_sum + first);
      if (soft) std::copy_n(total.data(), rows, soft + first);
    });
    if (!col_top) return;
    for (int64_t t = 1; t < threads_; ++t) tile::merge(width, tops.get(), sums.get(), tops.get() + t * width, sums.get() + t * width);
    std::copy_n(tops.get(), g.N, col_top);
    std::copy_n(sums.get(), g.N, col_sum);
  }

  // Gradients from known statistics. `soft` (optional) receives softplus sums; `stored` (optional) holds the scores,
  // which are recomputed otherwise.
  void gradient(const Weights<T>& weights, const Gradients<T>& out, T* soft, const T* stored, T* positive_score) {
    prepare_gradients();
    const int64_t width = blocks_ * kBlock;
    std::vector<T> col_lse(width, T(0)), g_col(width, T(0)), col_factor(width, T(0)), col_low(blocks_, T(0));
    if (weights.g_col) {
      for (int64_t j = 0; j < g.N; ++j) {
        col_lse[j] = finite_or_zero(weights.col_lse[j]);
        g_col[j] = weights.g_col[j];
      }
      for (int64_t b = 0; b < blocks_; ++b)
        col_low[b] = *std::min_element(&col_lse[b * kBlock], &col_lse[b * kBlock] + std::min(kBlock, g.N - b * kBlock));
    }
    for_panels([&](int64_t thread, int64_t p, Scratch& w) {
      const int64_t rows = rows_of(p), first = p * m_;
      pack_rows(p, w);
      pack_rows_transposed(p, w, nullptr);
      std::fill_n(w.dx.get(), dblocks_ * m_ * kBlock, T(0));
      std::vector<T> row_lse(m_, T(0)), g_row(m_, T(0)), g_soft(m_, T(0)), row_factor(m_, T(0)), total(m_, T(0)), da(m_, T(0));
      std::vector<T> block_factor(kBlock);
      T high = minus_infinity<T>();
      for (int64_t i = 0; i < rows; ++i) {
        if (weights.g_row) row_lse[i] = finite_or_zero(weights.row_lse[first + i]);
        if (weights.g_row) g_row[i] = weights.g_row[first + i];
        if (weights.g_soft) g_soft[i] = weights.g_soft[first + i];
        high = std::max(high, row_lse[i]);
      }
      for (int64_t i = 0; i < rows; ++i) row_factor[i] = fast_exp(row_lse[i] - high);
      for (int64_t b = 0; b < blocks_; ++b) {
        T* s = w.scores.get();
        if (stored) {
          std::copy_n(stored + (p * blocks_ + b) * m_ * kBlock, m_ * kBlock, s);
        } else {
          scores(p, b, w, s);
        }
        if (positive_score) read_positives(p, b, s, positive_score);
        if (weights.soft_signed) flip_positives(p, b, s);
        // exp(S - c_j) = exp(S - r_i) exp(r_i - c_j) saves half of the exponentials. It is not used where r_i - c_j may
        // be large, because exp(S - r_i) could then underflow although exp(S - c_j) does not.
        const bool factored = weights.g_row && weights.g_col && high - col_low[b] <= T(20);
        if (factored)
          for (int64_t j = 0; j < kBlock; ++j) block_factor[j] = fast_exp(std::min(high - col_lse[b * kBlock + j], T(20)));
        tile::dscore(rows, s,
                     {row_lse.data(), weights.g_row ? g_row.data() : nullptr, &col_lse[b * kBlock],
                      weights.g_col ? &g_col[b * kBlock] : nullptr, weights.g_soft ? g_soft.data() : nullptr,
                      soft ? total.data() : nullptr, factored, row_factor.data(), block_factor.data()});
        if (weights.soft_signed) flip_positives(p, b, s);
        if (weights.g_pos)
          each_positive(p, b, [&](int64_t i, int64_t at) { s[at] += weights.g_pos[first + i]; });
        clear_padding(rows, s);
        accumulate_biases(thread, b, m_, s, da.data());
        accumulate_operands(b, w, s);
      }
      finish_rows(p, w, out, nullptr);
      if (out.row_bias) std::copy_n(da.data(), rows, out.row_bias + first);
      if (soft) std::copy_n(total.data(), rows, soft + first);
    });
    finish_columns(out);
  }

  // sum_i w_row row_lse_i - w_pos S_i,pos(i) with its gradients in one pass of 3N FLOPs; a panel of scores stays in L2.
  double row_loss(T w_row, T w_pos, const Gradients<T>& out) {
    prepare_gradients();
    std::vector<double> partial(threads_, 0.0);
    for_panels([&](int64_t thread, int64_t p, Scratch& w) {
      const int64_t rows = rows_of(p), first = p * m_;
      if (!w.panel) w.panel = make_buffer<T>(blocks_ * m_ * kBlock);
      pack_rows(p, w);
      std::vector<T> top(m_, minus_infinity<T>()), sum(m_, T(0)), weight(m_, T(0)), da(m_, T(0)), positive(m_, T(0));
      for (int64_t b = 0; b < blocks_; ++b) {
        T* s = w.panel.get() + b * m_ * kBlock;
        scores(p, b, w, s);
        tile::row_max(rows, s, top.data());
        each_positive(p, b, [&](int64_t i, int64_t at) { positive[i] = s[at]; });
      }
      std::vector<T> safe(top);
      for (T& t : safe) t = finite_or_zero(t);
      for (int64_t b = 0; b < blocks_; ++b) {
        T* s = w.panel.get() + b * m_ * kBlock;
        tile::exp_rows(rows, s, s, safe.data(), sum.data());
      }
      for (int64_t i = 0; i < rows; ++i) {
        const double lse_above_top = std::log(static_cast<double>(sum[i]));
        partial[thread] += w_row * lse_above_top;
        if (g.positive_shift >= 0) {
          partial[thread] += w_row * (static_cast<double>(top[i]) - positive[i]);
          partial[thread] += (static_cast<double>(w_row) - w_pos) * positive[i];
        } else {
          partial[thread] += static_cast<double>(w_row) * top[i];
        }
        // exp(S - top) is left unnormalised: the factor w / sum multiplies the rows of dx and x instead of every pair
        weight[i] = sum[i] > T(0) ? w_row / sum[i] : T(0);
      }
      std::fill_n(w.dx.get(), dblocks_ * m_ * kBlock, T(0));
      pack_rows_transposed(p, w, weight.data());
      for (int64_t b = 0; b < blocks_; ++b) {
        T* s = w.panel.get() + b * m_ * kBlock;
        if (w_pos != T(0)) each_positive(p, b, [&](int64_t i, int64_t at) { s[at] -= w_pos / w_row * sum[i]; });
        clear_padding(rows, s);
        if (needs_ & (kNeedRowBias | kNeedColBias)) {
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < kBlock; ++j) w.exps[i * kBlock + j] = s[i * kBlock + j] * weight[i];
          accumulate_biases(thread, b, rows, w.exps.get(), da.data());
        }
        accumulate_operands(b, w, s);
      }
      finish_rows(p, w, out, weight.data());
      if (out.row_bias) std::copy_n(da.data(), rows, out.row_bias + first);
    });
    finish_columns(out);
    double loss = 0;
    for (double part : partial) loss += part;
    return loss;
  }

  int64_t stored_elements() const { return panels_ * blocks_ * m_ * kBlock; }
  std::array<int64_t, 4> stored_shape() const { return {panels_, blocks_, m_, kBlock}; }
  int64_t panel_bytes() const { return blocks_ * m_ * kBlock * static_cast<int64_t>(sizeof(T)); }

 private:
  struct Scratch {
    Buffer<E> x, xt, rows16, vnni;
    Buffer<T> scores, exps, dx, dyt, panel, col_bias;
    bool dy_started = false;
    double dscale = 0;
  };

  // Every panel reads all of y and dy, so the larger D is, the more rows a panel should have. Measured on one Zen 4
  // core at B = N = 4096: at D = 512, panels of 64, 128, 256, 512 rows reach 89, 95, 99, 102 GFLOP/s; at D = 128 the
  // number of rows makes no difference.
  int64_t panel_rows() const {
    if (g.D < 256) return 128;
    const int64_t fitting = (int64_t{8} << 20) / (blocks_ * kBlock * static_cast<int64_t>(sizeof(T))) / 8 * 8;
    return std::clamp<int64_t>(fitting, 64, 512);
  }

  static T finite_or_zero(T v) { return v == minus_infinity<T>() ? T(0) : v; }
  int64_t rows_of(int64_t p) const { return std::min(m_, g.B - p * m_); }

  template <class F>
  void for_panels(F&& f) {
    auto run = [&](int64_t thread) {
      const FlushSubnormals flush;
      Scratch& w = scratch_[thread];
      if (!w.scores) {
        w.x = make_buffer<E>(m_ * depth_);
        w.scores = make_buffer<T>(m_ * kBlock);
        w.exps = make_buffer<T>(m_ * kBlock);
        if constexpr (kLow) w.rows16 = make_buffer<E>(m_ * kBlock), w.vnni = make_buffer<E>(m_ * kBlock);
      }
      const int64_t begin = panels_ * thread / threads_, end = panels_ * (thread + 1) / threads_;
      for (int64_t p = begin; p < end; ++p) f(thread, p, w);
      release_gemm(kLow);
    };
    if (threads_ == 1) return run(0);
    at::parallel_for(0, threads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) run(t);
    });
  }

  template <class F>
  void each_positive(int64_t p, int64_t b, F&& f) const {
    if (g.positive_shift < 0) return;
    const int64_t rows = rows_of(p), low = b * kBlock;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t j = g.positive(p * m_ + i) - low;
      if (j >= 0 && j < kBlock) f(i, i * kBlock + j);
    }
  }
  void read_positives(int64_t p, int64_t b, const T* s, T* out) const {
    each_positive(p, b, [&](int64_t i, int64_t at) { out[p * m_ + i] = s[at]; });
  }
  void flip_positives(int64_t p, int64_t b, T* s) const {
    each_positive(p, b, [&](int64_t, int64_t at) { s[at] = -s[at]; });
  }
  void clear_padding(int64_t rows, T* s) const { std::fill_n(s + rows * kBlock, (m_ - rows) * kBlock, T(0)); }

  static void put(E* out, const T* in, int64_t n) {
    if constexpr (kLow) {
      to_bf16(n, in, reinterpret_cast<uint16_t*>(out));
    } else {
      std::copy_n(in, n, out);
    }
  }
  static void put_tile(E* out, const T* in, int64_t rows) {  // stores [rows][kBlock] as a right operand
    if constexpr (kLow) {
      tile::to_vnni(rows / 2, in, reinterpret_cast<uint32_t*>(out));
    } else {
      std::copy_n(in, rows * kBlock, out);
    }
  }

  void pack_columns() {
    const bool want_dx = needs_ & (kNeedX | kNeedScale);
    yt_ = make_buffer<E>(blocks_ * depth_ * kBlock);
    if (want_dx) yp_ = make_buffer<E>(dblocks_ * blocks_ * kBlock * kBlock);
    auto run = [&](int64_t begin, int64_t end) {
      std::vector<T> t(std::max(depth_, kBlock) * kBlock);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t n = std::min(kBlock, g.N - b * kBlock);
        std::fill(t.begin(), t.end(), T(0));
        rows::transpose(n, g.D, g.y + b * kBlock * g.D, g.D, nullptr, t.data(), kBlock);
        put_tile(yt_.get() + b * depth_ * kBlock, t.data(), depth_);
        if (!want_dx) continue;
        for (int64_t c = 0; c < dblocks_; ++c) {
          const int64_t width = std::min(kBlock, g.D - c * kBlock);
          std::fill_n(t.begin(), kBlock * kBlock, T(0));
          for (int64_t j = 0; j < n; ++j) std::copy_n(g.y + (b * kBlock + j) * g.D + c * kBlock, width, &t[j * kBlock]);
          put_tile(yp_.get() + (c * blocks_ + b) * kBlock * kBlock, t.data(), kBlock);
        }
      }
    };
    if (threads_ == 1) return run(0, blocks_);
    at::parallel_for(0, blocks_, (blocks_ + threads_ - 1) / threads_, run);
  }

  void pack_rows(int64_t p, Scratch& w) const {
    const int64_t rows = rows_of(p);
    std::fill_n(w.x.get() + rows * depth_, (m_ - rows) * depth_, E(0));
    if constexpr (!kLow) return rows::scaled_copy(rows * g.D, g.x + p * m_ * g.D, g.scale, w.x.get());
    for (int64_t i = 0; i < rows; ++i) {  // 16-bit operands stay exact; their scale is applied to the scores
      put(w.x.get() + i * depth_, g.x + (p * m_ + i) * g.D, g.D);
      std::fill_n(w.x.get() + i * depth_ + g.D, depth_ - g.D, E(0));
    }
  }

  // x^T [D][m], rows scaled by the score's scale and by `weight`: the left operand of dy^T
  void pack_rows_transposed(int64_t p, Scratch& w, const T* weight) const {
    if (!(needs_ & kNeedY)) return;
    const int64_t rows = rows_of(p);
    std::vector<T> t(16 * m_, T(0)), factor(rows, g.scale);
    for (int64_t i = 0; weight && i < rows; ++i) factor[i] *= weight[i];
    for (int64_t d0 = 0; d0 < g.D; d0 += 16) {
      const int64_t n = std::min<int64_t>(16, g.D - d0);
      rows::transpose(rows, n, g.x + p * m_ * g.D + d0, g.D, factor.data(), t.data(), m_);
      put(w.xt.get() + d0 * m_, t.data(), n * m_);
    }
  }

  void scores(int64_t p, int64_t b, Scratch& w, T* s) const {
    gemm(m_, depth_, depth_, false, w.x.get(), yt_.get() + b * depth_ * kBlock, s);
    const int64_t rows = rows_of(p), valid = std::min(kBlock, g.N - b * kBlock);
    T bias[kBlock];
    if (g.col_bias) {
      std::copy_n(g.col_bias + b * kBlock, valid, bias);
      std::fill(bias + valid, bias + kBlock, T(0));
    }
    if (kLow || g.row_bias || g.col_bias)
      tile::affine(rows, s, kLow ? g.scale : T(1), g.row_bias ? g.row_bias + p * m_ : nullptr, g.col_bias ? bias : nullptr);
    if (g.pairs != kAll) mask(p, b, s);
    if (valid < kBlock)
      for (int64_t i = 0; i < rows; ++i) std::fill(s + i * kBlock + valid, s + (i + 1) * kBlock, minus_infinity<T>());
  }

  void mask(int64_t p, int64_t b, T* s) const {
    const int64_t rows = rows_of(p), valid = std::min(kBlock, g.N - b * kBlock);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = p * m_ + i;
      if (g.pairs == kOffDiagonal) {
        const int64_t j = row - b * kBlock;
        if (j >= 0 && j < valid) s[i * kBlock + j] = minus_infinity<T>();
        continue;
      }
      const int64_t keep = g.pairs == kUnequalIdsOrPositive ? g.positive(row) - b * kBlock : -1;
      const int64_t id = g.row_ids[row];
      for (int64_t j = 0; j < valid; ++j)
        if (g.col_ids[b * kBlock + j] == id && j != keep) s[i * kBlock + j] = minus_infinity<T>();
    }
  }

  void prepare_gradients() {
    for (Scratch& w : scratch_) {
      w.dx = make_buffer<T>(dblocks_ * m_ * kBlock);
      if (needs_ & kNeedY) w.xt = make_buffer<E>(g.D * m_), w.dyt = make_buffer<T>(blocks_ * g.D * kBlock);
      if (needs_ & kNeedColBias) w.col_bias = make_buffer<T>(blocks_ * kBlock), std::fill_n(w.col_bias.get(), blocks_ * kBlock, T(0));
    }
  }

  void accumulate_biases(int64_t thread, int64_t b, int64_t rows, const T* ds, T* da) {
    if (needs_ & kNeedRowBias) tile::row_sums(rows, ds, da);
    if (needs_ & kNeedColBias) tile::col_sums(rows, ds, scratch_[thread].col_bias.get() + b * kBlock);
  }
  void accumulate_operands(int64_t b, Scratch& w, const T* ds) {
    const E *left, *right;
    if constexpr (kLow) {
      put(w.rows16.get(), ds, m_ * kBlock);
      put_tile(w.vnni.get(), ds, m_);
      left = w.rows16.get(), right = w.vnni.get();
    } else {
      left = right = ds;
    }
    if (needs_ & (kNeedX | kNeedScale))
      for (int64_t c = 0; c < dblocks_; ++c)
        gemm(m_, kBlock, kBlock, b > 0, left, yp_.get() + (c * blocks_ + b) * kBlock * kBlock, w.dx.get() + c * m_ * kBlock);
    if (needs_ & kNeedY) gemm(g.D, m_, m_, w.dy_started, w.xt.get(), right, w.dyt.get() + b * g.D * kBlock);
    if (b + 1 == blocks_) w.dy_started = true;
  }

  void finish_rows(int64_t p, Scratch& w, const Gradients<T>& out, const T* weight) {
    if (!(needs_ & (kNeedX | kNeedScale))) return;
    const int64_t rows = rows_of(p);
    for (int64_t i = 0; i < rows; ++i) {
      const T f = weight ? weight[i] : T(1);
      const int64_t row = (p * m_ + i) * g.D;
      double dot = 0;
      for (int64_t c = 0; c < dblocks_; ++c) {
        const int64_t d = c * kBlock, n = std::min(kBlock, g.D - d);
        const T* dx = w.dx.get() + (c * m_ + i) * kBlock;
        if (needs_ & kNeedScale) dot += rows::dot(n, dx, g.x + row + d);
        if (out.x) rows::scaled_copy(n, dx, f * g.scale, out.x + row + d);
      }
      w.dscale += dot * f;
    }
    const int64_t first = p * m_;
    if (out.x && out.x_inverse)
      rows::through_normalization(rows, g.D, g.x + first * g.D, out.x_inverse + first, out.x + first * g.D);
  }

  void finish_columns(const Gradients<T>& out) {
    if (out.scale) {
      double total = 0;
      for (const Scratch& w : scratch_) total += w.dscale;
      *out.scale = static_cast<T>(total);
    }
    if (out.col_bias)
      for (int64_t j = 0; j < g.N; ++j) {
        T total = T(0);
        for (const Scratch& w : scratch_) total += w.col_bias[j];
        out.col_bias[j] = total;
      }
    if (!out.y) return;
    auto run = [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t n = std::min(kBlock, g.N - b * kBlock);
        T* sum = scratch_[0].dyt.get() + b * g.D * kBlock;
        for (int64_t t = 1; t < threads_; ++t)
          rows::add(g.D * kBlock, scratch_[t].dyt.get() + b * g.D * kBlock, sum);
        const int64_t first = b * kBlock;
        rows::transpose(g.D, n, sum, kBlock, nullptr, out.y + first * g.D, g.D);
        if (out.y_inverse)
          rows::through_normalization(n, g.D, g.y + first * g.D, out.y_inverse + first, out.y + first * g.D);
      }
    };
    if (threads_ == 1) return run(0, blocks_);
    at::parallel_for(0, blocks_, (blocks_ + threads_ - 1) / threads_, run);
  }

  Group<T> g;
  int64_t needs_, blocks_, dblocks_, depth_, panels_ = 1, m_ = 8, threads_ = 1;
  Buffer<E> yt_, yp_;
  std::vector<Scratch> scratch_;
};

}  // namespace mk::dot_critic
