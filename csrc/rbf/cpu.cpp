// Sums of a Gaussian kernel over pairs on a CPU, with their gradients in the same pass (mi_kernels/ops/rbf/schema.py).
//
// x and y are one sequence of tiles of 64 rows, and only pairs of tiles p <= q are formed: a symmetric sum costs half.
// A tile of inner products is made by brgemm and turned into slopes W = dL/d(r^2) * 2 while it is in cache; then
//   dz_p -= W z_q (owned by p's thread),   dz_q^T -= z_p^T W (per thread, summed in a fixed order),
// and the parts along z_i itself come from W's row and column sums. With N^2 pairs in all and M = N^2 D FLOP:
// M for the value, 2 M for the gradients. Extra memory: 2 copies of the tiles and one gradient a thread.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../common/gemm.h"
#include "../common/rows.h"

namespace mk {
namespace {

using at::Tensor;

enum RbfNeeds : int64_t { kNeedX = 1, kNeedY = 2, kNeedGamma = 4 };

// exp(t) - 1 for t <= 0 with a small relative error: 2^n expm1(r) + (2^n - 1), t = n log 2 + r.
MK_INLINE float fast_expm1(float t) {
  const float clamped = t < -87.0f ? -87.0f : t;  // this way round a NaN stays one
  const float magic = 12582912.0f;
  const float n = (clamped * 1.44269504f + magic) - magic;
  float r = clamped - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return power * p + (power - 1.0f);
}
MK_INLINE double fast_expm1(double t) { return std::expm1(t); }

template <class T>
struct TileWork {
  int64_t rows;
  T* s;                        // [rows][kBlock]: inner products, replaced by slopes
  const T *row_norm, *col_norm, *col_valid;
  const T* gamma;
  int64_t K;
  T slope;                     // of a kernel value: -2 weight gamma / K, without gamma
  T *row_sum, *col_sum;        // of the slopes, accumulated
  double* gamma_sum;           // [K], sum of r^2 k; may be null
};

template <class T>
MK_INLINE double kernel_tile(const TileWork<T>& w) {
  const T tolerance = T(4) * std::numeric_limits<T>::epsilon();
  T columns[kBlock] = {}, total[kBlock] = {}, norm[kBlock], valid[kBlock];  // locals: no store can alias them
  for (int64_t j = 0; j < kBlock; ++j) norm[j] = w.col_norm[j], valid[j] = w.col_valid[j];
  for (int64_t i = 0; i < w.rows; ++i) {
    T r[kBlock], slope[kBlock] = {};
    T* s = w.s + i * kBlock;
    const T own = w.row_norm[i];
    for (int64_t j = 0; j < kBlock; ++j) {
      const T norms = own + norm[j], d = norms - T(2) * s[j];
      r[j] = d <= tolerance * norms ? T(0) : d;  // within rounding of 0; a NaN stays one
    }
    for (int64_t k = 0; k < w.K; ++k) {
      const T g = w.gamma[k];
      T kernel[kBlock];
      for (int64_t j = 0; j < kBlock; ++j) {
        const T e = fast_expm1(-g * r[j]) * valid[j];
        total[j] += e;
        kernel[j] = e + valid[j];
        slope[j] += g * kernel[j];
      }
      if (!w.gamma_sum) continue;
      T weighted = T(0);
#pragma omp simd reduction(+ : weighted)
      for (int64_t j = 0; j < kBlock; ++j) weighted += kernel[j] * r[j];
      w.gamma_sum[k] += weighted;
    }
    T sum = T(0);
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < kBlock; ++j) {
      const T v = slope[j] * w.slope;
      s[j] = v;
      columns[j] += v;
      sum += v;
    }
    w.row_sum[i] += sum;
  }
  for (int64_t j = 0; j < kBlock; ++j) w.col_sum[j] += columns[j];
  double found = 0;
  for (int64_t j = 0; j < kBlock; ++j) found += static_cast<double>(total[j]);
  return found;
}
MK_CLONES double kernel_of_tile(const TileWork<float>& w) { return kernel_tile(w); }
MK_CLONES double kernel_of_tile(const TileWork<double>& w) { return kernel_tile(w); }

template <class T>
using Array = std::unique_ptr<T[]>;
template <class T>
Array<T> array(int64_t n) {
  return Array<T>(new T[static_cast<size_t>(std::max<int64_t>(n, 1))]);
}

template <class T>
class Mmd {
 public:
  struct Side {
    const T* rows;
    int64_t count;
    T* gradient;  // null where it is not wanted
  };

  Mmd(const Side& x, const Side& y, int64_t depth, const T* gamma, int64_t K, const double (&weights)[3], int64_t threads)
      : sides_{x, y}, D(depth), K_(K), gamma_(gamma), weights_{weights[0], weights[1], weights[2]} {
    x_tiles_ = (x.count + kBlock - 1) / kBlock;
    tiles_ = x_tiles_ + (y.count + kBlock - 1) / kBlock;
    dblocks_ = (D + kBlock - 1) / kBlock;
    gradients_ = x.gradient || y.gradient;
    threads_ = std::max<int64_t>(1, std::min(threads, (tiles_ + 1) / 2));
    pack();
  }

  // The value; gradients go to the sides, d/dgamma [K] to `dgamma` if given.
  double run(double* dgamma) {
    std::vector<Scratch> scratch(threads_);
    each_thread([&](int64_t t) { work(t, scratch[t], dgamma != nullptr); });
    double value = 0;
    for (const Scratch& w : scratch) value += w.value;
    if (dgamma)
      for (int64_t k = 0; k < K_; ++k) {
        dgamma[k] = 0;
        for (const Scratch& w : scratch) dgamma[k] += w.gamma[k];
      }
    if (gradients_) finish(scratch);
    return value;
  }

 private:
  struct Scratch {
    double value = 0;
    std::vector<double> gamma;
    Array<T> dzt, col_sum;  // [tiles][D][kBlock] and [tiles][kBlock]
  };

  const Side& side(int64_t p) const { return sides_[p < x_tiles_ ? 0 : 1]; }
  int64_t first(int64_t p) const { return (p < x_tiles_ ? p : p - x_tiles_) * kBlock; }
  int64_t rows(int64_t p) const { return std::min(kBlock, side(p).count - first(p)); }
  const T* at(int64_t p) const { return side(p).rows + first(p) * D; }

  template <class F>
  void each_thread(F&& f) const {
    if (threads_ == 1) return f(0);
    at::parallel_for(0, threads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) f(t);
    });
  }

  void pack() {
    zt_ = array<T>(tiles_ * D * kBlock);
    if (gradients_) zp_ = array<T>(tiles_ * dblocks_ * kBlock * kBlock), row_sum_ = array<T>(tiles_ * kBlock);
    norm_ = array<T>(tiles_ * kBlock), valid_ = array<T>(tiles_ * kBlock);
    each_thread([&](int64_t t) {
      for (int64_t p = tiles_ * t / threads_; p < tiles_ * (t + 1) / threads_; ++p) pack_tile(p);
    });
  }

  void pack_tile(int64_t p) {
    const int64_t n = rows(p);
    const T* z = at(p);
    T* zt = zt_.get() + p * D * kBlock;
    if (n < kBlock) std::fill_n(zt, D * kBlock, T(0));
    rows::transpose(n, D, z, D, nullptr, zt, kBlock);
    T* norm = norm_.get() + p * kBlock;
    std::fill_n(norm, kBlock, T(0));
    rows::squared_norms(n, D, z, norm);
    for (int64_t i = 0; i < kBlock; ++i) valid_[p * kBlock + i] = i < n ? T(1) : T(0);
    if (!gradients_) return;
    T* zp = zp_.get() + p * dblocks_ * kBlock * kBlock;
    std::fill_n(zp, dblocks_ * kBlock * kBlock, T(0));
    for (int64_t b = 0; b < dblocks_; ++b)
      for (int64_t i = 0; i < n; ++i)
        std::copy_n(z + i * D + b * kBlock, std::min(kBlock, D - b * kBlock), zp + (b * kBlock + i) * kBlock);
  }

  void work(int64_t t, Scratch& w, bool want_gamma) {
    const Array<T> s = array<T>(kBlock * kBlock), acc = array<T>(dblocks_ * kBlock * kBlock);
    T row_sum[kBlock];
    w.gamma.assign(K_, 0.0);
    w.col_sum = array<T>(tiles_ * kBlock);
    std::fill_n(w.col_sum.get(), tiles_ * kBlock, T(0));
    if (gradients_) w.dzt = array<T>(tiles_ * D * kBlock), std::fill_n(w.dzt.get(), tiles_ * D * kBlock, T(0));
    for (int64_t p = 0; p < tiles_; ++p) {
      const int64_t turn = p % (2 * threads_);  // there and back, so that long and short rows of tiles even out
      if ((turn < threads_ ? turn : 2 * threads_ - 1 - turn) != t) continue;
      std::fill_n(row_sum, kBlock, T(0));
      bool started = false;
      for (int64_t q = p; q < tiles_; ++q) started |= pair(p, q, s.get(), acc.get(), row_sum, started, w, want_gamma);
      if (side(p).gradient) own_rows(p, started ? acc.get() : nullptr, row_sum);
    }
    release_gemm(false);
  }

  bool pair(int64_t p, int64_t q, T* s, T* acc, T* row_sum, bool started, Scratch& w, bool want_gamma) const {
    const bool x_row = p < x_tiles_, x_col = q < x_tiles_;
    const double weight = weights_[x_row == x_col ? (x_row ? 0 : 1) : 2] * (x_row == x_col && p != q ? 2 : 1);
    if (weight == 0) return false;
    const int64_t n = rows(p);
    const T* norm = norm_.get() + p * kBlock;
    gemm(n, D, D, false, at(p), zt_.get() + q * D * kBlock, s);
    if (p == q)
      for (int64_t i = 0; i < n; ++i) s[i * kBlock + i] = norm[i];
    std::vector<double> gamma_sum(want_gamma ? K_ : 0, 0.0);
    const TileWork<T> tile{n, s, norm, norm_.get() + q * kBlock, valid_.get() + q * kBlock, gamma_, K_,
                           static_cast<T>(-2 * weight / K_), row_sum, w.col_sum.get() + q * kBlock,
                           want_gamma ? gamma_sum.data() : nullptr};
    w.value += weight / K_ * kernel_of_tile(tile);
    for (int64_t k = 0; k < static_cast<int64_t>(gamma_sum.size()); ++k) w.gamma[k] -= weight / K_ * gamma_sum[k];
    if (side(p).gradient)
      for (int64_t b = 0; b < dblocks_; ++b)
        gemm(n, kBlock, kBlock, started, s, zp_.get() + (q * dblocks_ + b) * kBlock * kBlock, acc + b * kBlock * kBlock);
    if (side(q).gradient) {
      std::fill_n(s + n * kBlock, (kBlock - n) * kBlock, T(0));
      gemm(D, kBlock, kBlock, true, zt_.get() + p * D * kBlock, s, w.dzt.get() + q * D * kBlock);
    }
    return true;
  }

  void own_rows(int64_t p, const T* acc, const T* row_sum) {
    T* out = side(p).gradient + first(p) * D;
    std::copy_n(row_sum, kBlock, row_sum_.get() + p * kBlock);
    if (!acc) return std::fill_n(out, rows(p) * D, T(0)), void();
    for (int64_t d = 0; d < D; d += kBlock)
      for (int64_t i = 0; i < rows(p); ++i)
        rows::scaled_copy(std::min(kBlock, D - d), acc + (d + i) * kBlock, T(-1), out + i * D + d);
  }

  void finish(std::vector<Scratch>& scratch) {
    each_thread([&](int64_t t) {
      std::vector<T> back(kBlock * D);
      for (int64_t p = tiles_ * t / threads_; p < tiles_ * (t + 1) / threads_; ++p) {
        if (!side(p).gradient) continue;
        T* out = side(p).gradient + first(p) * D;
        T along[kBlock];
        for (int64_t i = 0; i < kBlock; ++i) {
          along[i] = row_sum_[p * kBlock + i];
          for (const Scratch& w : scratch) along[i] += w.col_sum[p * kBlock + i];
        }
        T* other = scratch[0].dzt.get() + p * D * kBlock;
        for (size_t k = 1; k < scratch.size(); ++k) rows::add(D * kBlock, scratch[k].dzt.get() + p * D * kBlock, other);
        rows::transpose(D, rows(p), other, kBlock, nullptr, back.data(), D);
        for (int64_t i = 0; i < rows(p); ++i) rows::step_along(D, along[i], at(p) + i * D, back.data() + i * D, out + i * D);
      }
    });
  }

  Side sides_[2];
  int64_t D, K_, x_tiles_, tiles_, dblocks_, threads_;
  const T* gamma_;
  double weights_[3];
  bool gradients_;
  Array<T> zt_, zp_, norm_, valid_, row_sum_;
};

template <class T>
void each_group(const Tensor& x, const Tensor& y, const Tensor& gamma, const double (&weights)[3], Tensor& value,
                Tensor& dx, Tensor& dy, Tensor& dgamma) {
  const int64_t G = x.size(0), B = x.size(1), N = y.size(1), D = x.size(2), K = gamma.size(1);
  const double flops = 1.0 * (B + N) * (B + N) * D;
  const int64_t available = at::in_parallel_region() ? 1 : at::get_num_threads();
  auto one = [&](int64_t g, int64_t threads) {
    auto part = [g](Tensor& t, int64_t n) { return t.numel() ? t.mutable_data_ptr<T>() + g * n : nullptr; };
    std::vector<double> slopes(dgamma.numel() ? K : 0);
    Mmd<T> problem({x.const_data_ptr<T>() + g * B * D, B, part(dx, B * D)},
                   {y.const_data_ptr<T>() + g * N * D, N, part(dy, N * D)}, D, gamma.const_data_ptr<T>() + g * K, K,
                   weights, threads);
    value.mutable_data_ptr<double>()[g] = problem.run(slopes.empty() ? nullptr : slopes.data());
    for (int64_t k = 0; k < static_cast<int64_t>(slopes.size()); ++k) part(dgamma, K)[k] = static_cast<T>(slopes[k]);
  };
  if (G >= available && G > 1 && available > 1 && flops * G > 1e6) {
    at::parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) one(g, 1);
    });
  } else {
    for (int64_t g = 0; g < G; ++g) one(g, flops > 1.5e6 ? available : 1);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rbf_mmd(const Tensor& x, const Tensor& y, const Tensor& gamma, double w_xx,
                                                   double w_yy, double w_xy, int64_t needs) {
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto cast = [&](const Tensor& t) { return t.to(type).contiguous(); };
  const Tensor a = cast(x), b = cast(y), c = cast(gamma);
  auto wanted = [&](int64_t bit, const Tensor& t) {
    return at::empty(needs & bit ? t.sizes() : at::IntArrayRef{0}, t.options());
  };
  Tensor value = at::empty({x.size(0)}, a.options().dtype(at::kDouble));
  Tensor dx = wanted(kNeedX, a), dy = wanted(kNeedY, b), dgamma = wanted(kNeedGamma, c);
  const double weights[3] = {w_xx, w_yy, w_xy};
  if (type == at::kDouble) {
    each_group<double>(a, b, c, weights, value, dx, dy, dgamma);
  } else {
    each_group<float>(a, b, c, weights, value, dx, dy, dgamma);
  }
  return {value, dx.to(x.scalar_type()), dy.to(y.scalar_type()), dgamma.to(gamma.scalar_type())};
}

}  // namespace
}  // namespace mk

TORCH_LIBRARY_IMPL(mi_kernels_cpu, CPU, m) { m.impl("rbf_mmd", &mk::rbf_mmd); }
