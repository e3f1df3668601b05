// Weighted sums of a Gaussian kernel over pairs of rows (MMD) on a CPU, with their gradients in the same pass;
// mi_kernels/ops/rbf/schema.py has the formulas. x and y are one sequence of tiles (tiles.h), so that a symmetric sum
// costs half.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "mmd_tile.h"
#include "schema.h"
#include "tiles.h"

namespace mk::rbf {
namespace {

using at::Tensor;

template <class T>
class Mmd {
 public:
  Mmd(const Side<T>& x, const Side<T>& y, int64_t depth, const Precisions<T>& kernels, const double (&weights)[3],
      int64_t threads)
      : z_({x, y}, depth, kernels.scale), K_(static_cast<int64_t>(kernels.gamma.size())), gamma_(kernels.gamma.data()),
        weights_{weights[0], weights[1], weights[2]} {
    threads_ = std::max<int64_t>(1, std::min(threads, (z_.count() + 1) / 2));
    each_share([&](int64_t begin, int64_t end) { z_.pack(begin, end); });
  }

  // Returns the value. The samples' gradients go to the sides, those of gamma [K] to `dgamma`, if given.
  double run(double* dgamma) {
    std::vector<Scratch> scratch(threads_);
    each_thread(threads_, [&](int64_t t) { work(t, scratch[t], dgamma != nullptr); });
    double value = 0;
    std::vector<typename Tiles<T>::Work*> parts;
    for (Scratch& w : scratch) value += w.value, parts.push_back(&w.tiles);
    for (int64_t k = 0; dgamma && k < K_; ++k) {
      dgamma[k] = 0;
      for (const Scratch& w : scratch) dgamma[k] += w.gamma[k];
    }
    each_share([&](int64_t begin, int64_t end) { z_.finish(begin, end, parts); });
    return value;
  }

 private:
  struct Scratch {
    double value = 0;
    std::vector<double> gamma;
    typename Tiles<T>::Work tiles;
  };

  template <class F>
  void each_share(F&& f) const {
    each_thread(threads_, [&](int64_t t) { f(z_.count() * t / threads_, z_.count() * (t + 1) / threads_); });
  }

  void work(int64_t t, Scratch& w, bool want_gamma) {
    const Array<T> s = array<T>(kBlock * kBlock);
    w.gamma.assign(K_, 0.0);
    z_.begin(w.tiles);
    each_row_of_tiles(z_.count(), t, threads_, [&](int64_t p) {
      z_.begin_row(w.tiles);
      for (int64_t q = p; q < z_.count(); ++q) pair(p, q, s.get(), w, want_gamma);
      z_.end_row(p, w.tiles);
    });
    release_gemm(false);
  }

  void pair(int64_t p, int64_t q, T* s, Scratch& w, bool want_gamma) const {
    const bool same = z_.side(p) == z_.side(q);
    const double weight = weights_[same ? z_.side(p) : 2] * (same && p != q ? 2 : 1);
    if (weight == 0) return;
    const typename Tiles<T>::Pair both = z_.products(p, q, s);
    std::vector<double> gamma_sum(want_gamma ? K_ : 0, 0.0);
    const TileWork<T> tile{z_.rows(p), s, both.row_norm, both.col_norm, z_.valid(q), gamma_, K_,
                           static_cast<T>(-2 * weight / K_), z_.row_sum(both, w.tiles), z_.col_sum(both, w.tiles),
                           want_gamma ? gamma_sum.data() : nullptr, p == q};
    w.value += weight / K_ * kernel_of_tile(tile);
    for (int64_t k = 0; k < static_cast<int64_t>(gamma_sum.size()); ++k) w.gamma[k] -= weight / K_ * gamma_sum[k];
    z_.add(both, w.tiles);
  }

  Tiles<T> z_;
  int64_t K_, threads_ = 1;
  const T* gamma_;
  double weights_[3];
};

template <class T>
void mmd_of(const Tensor& x, const Tensor& y, const Tensor& bandwidth, const double (&weights)[3], Tensor& value,
            Tensor& dx, Tensor& dy, Tensor& dbandwidth) {
  const int64_t B = x.size(1), N = y.size(1), D = x.size(2), K = bandwidth.size(1);
  each_group(x.size(0), 1.0 * (B + N) * (B + N) * D, [&](int64_t g, int64_t threads) {
    auto part = [g](Tensor& t, int64_t n) { return t.numel() ? t.mutable_data_ptr<T>() + g * n : nullptr; };
    std::vector<double> slopes(dbandwidth.numel() ? K : 0);
    const T* widths = bandwidth.const_data_ptr<T>() + g * K;
    const Precisions<T> kernels(widths, K);
    Mmd<T> problem({x.const_data_ptr<T>() + g * B * D, B, part(dx, B * D)},
                   {y.const_data_ptr<T>() + g * N * D, N, part(dy, N * D)}, D, kernels, weights, threads);
    value.mutable_data_ptr<double>()[g] = problem.run(slopes.empty() ? nullptr : slopes.data());
    for (int64_t k = 0; k < static_cast<int64_t>(slopes.size()); ++k)
      part(dbandwidth, K)[k] = static_cast<T>(kernels.of_bandwidth(k, slopes[k], widths[k]));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rbf_mmd(const Tensor& x, const Tensor& y, const Tensor& bandwidth,
                                                   double w_xx, double w_yy, double w_xy, int64_t needs) {
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto cast = [&](const Tensor& t) { return t.to(type).contiguous(); };
  const Tensor a = cast(x), b = cast(y), c = cast(bandwidth);
  auto wanted = [&](int64_t bit, const Tensor& t) {
    return at::empty(needs & bit ? t.sizes() : at::IntArrayRef{0}, t.options());
  };
  Tensor value = at::empty({x.size(0)}, a.options().dtype(at::kDouble));
  Tensor dx = wanted(kNeedX, a), dy = wanted(kNeedY, b), dbandwidth = wanted(kNeedBandwidth, c);
  const double weights[3] = {w_xx, w_yy, w_xy};
  (type == at::kDouble ? mmd_of<double> : mmd_of<float>)(a, b, c, weights, value, dx, dy, dbandwidth);
  return {value, dx.to(x.scalar_type()), dy.to(y.scalar_type()), dbandwidth.to(bandwidth.scalar_type())};
}

}  // namespace
}  // namespace mk::rbf

TORCH_LIBRARY_IMPL(mi_kernels_cpu, CPU, m) { m.impl("rbf_mmd", &mk::rbf::rbf_mmd); }
