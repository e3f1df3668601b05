// HSIC's sums on a CPU; mi_kernels/ops/rbf/schema.py has the formulas. Both Gram matrices are computed tile by tile,
// for pairs of tiles p <= q, and never stored. With M(D) = B^2 D FLOP, the forward takes M(Dx + Dy) and the backward
// three times that.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "hsic_tile.h"
#include "schema.h"
#include "tiles.h"

namespace mk::rbf {
namespace {

using at::Tensor;

template <class T>
class Hsic {
 public:
  Hsic(const Side<T>& x, int64_t x_depth, T sx, const Side<T>& y, int64_t y_depth, T sy, int64_t threads)
      : of_x_(&sx, 1), of_y_(&sy, 1), x_({x}, x_depth, of_x_.scale), y_({y}, y_depth, of_y_.scale), B_(x.count),
        gx_(of_x_.gamma[0]), gy_(of_y_.gamma[0]), sx_(sx), sy_(sy) {
    threads_ = std::max<int64_t>(1, std::min(threads, (x_.count() + 1) / 2));
    each_share([&](int64_t begin, int64_t end) { x_.pack(begin, end), y_.pack(begin, end); });
  }

  // Writes products [3] and rows [2][B].
  void forward(double* products, double* rows) {
    const int64_t width = x_.count() * kBlock;
    std::vector<std::vector<double>> found(threads_, std::vector<double>(3 + 2 * width, 0.0));
    each_pair([&](int64_t t, int64_t p, int64_t q, const Pair& of_x, const Pair& of_y) {
      const Kernel<T> kx = kernel(of_x, gx_), ky = kernel(of_y, gy_);
      double *of_products = found[t].data(), *of_rows = of_products + 3;
      Sums<T> sums;
      sums_of_tile(x_.rows(p), kx, ky, x_.valid(q), sums);
      for (int64_t k = 0; k < 3; ++k) of_products[k] += (p == q ? 1 : 2) * sums.products[k];
      for (int64_t i = 0; i < x_.rows(p); ++i) {
        of_rows[p * kBlock + i] += sums.rows_e[i];
        of_rows[width + p * kBlock + i] += sums.rows_f[i];
      }
      for (int64_t j = 0; p != q && j < kBlock; ++j) {
        of_rows[q * kBlock + j] += sums.cols_e[j];
        of_rows[width + q * kBlock + j] += sums.cols_f[j];
      }
    }, [](int64_t, int64_t) {}, [](int64_t, int64_t) {});
    for (int64_t t = 1; t < threads_; ++t)
      for (size_t k = 0; k < found[0].size(); ++k) found[0][k] += found[t][k];
    std::copy_n(found[0].data(), 3, products);
    std::copy_n(found[0].data() + 3, B_, rows);
    std::copy_n(found[0].data() + 3 + width, B_, rows + B_);
  }

  // g [3]: gradients with respect to the three traces divided by B^2. The samples' gradients go to their sides, those
  // of the bandwidths to dsx and dsy.
  void backward(const double* g, const double* rows, double* dsx, double* dsy) {
    const int64_t width = x_.count() * kBlock;
    std::vector<T> mean_e(width, T(0)), mean_f(width, T(0));
    double all_e = 0, all_f = 0;
    const double batch = static_cast<double>(B_);
    for (int64_t i = 0; i < B_; ++i) {
      mean_e[i] = static_cast<T>(rows[i] / batch), mean_f[i] = static_cast<T>(rows[B_ + i] / batch);
      all_e += rows[i], all_f += rows[B_ + i];
    }
    struct Scratch {
      typename Tiles<T>::Work x, y;
      double gamma_x = 0, gamma_y = 0;
    };
    std::vector<Scratch> scratch(threads_);
    auto slope = [&](int k) { return static_cast<T>(g[k] / (batch * batch)); };
    each_pair(
        [&](int64_t t, int64_t p, int64_t q, const Pair& of_x, const Pair& of_y) {
          Scratch& w = scratch[t];
          const Kernel<T> kx = kernel(of_x, gx_), ky = kernel(of_y, gy_);
          const Means<T> means{&mean_e[p * kBlock], &mean_f[p * kBlock], &mean_e[q * kBlock], &mean_f[q * kBlock],
                               static_cast<T>(all_e / (batch * batch)), static_cast<T>(all_f / (batch * batch))};
          Slopes<T> out{slope(0), slope(1), slope(2), T(p == q ? -2 : -4), p == q,
                        x_.row_sum(of_x, w.x), x_.col_sum(of_x, w.x), y_.row_sum(of_y, w.y), y_.col_sum(of_y, w.y), 0, 0};
          slopes_of_tile(x_.rows(p), kx, ky, x_.valid(q), means, out);
          w.gamma_x -= (p == q ? 1 : 2) * out.gamma_x, w.gamma_y -= (p == q ? 1 : 2) * out.gamma_y;
          x_.add(of_x, w.x), y_.add(of_y, w.y);
        },
        [&](int64_t t, int64_t p) {
          if (p < 0) return x_.begin(scratch[t].x), y_.begin(scratch[t].y);
          x_.begin_row(scratch[t].x), y_.begin_row(scratch[t].y);
        },
        [&](int64_t t, int64_t p) { x_.end_row(p, scratch[t].x), y_.end_row(p, scratch[t].y); });
    std::vector<typename Tiles<T>::Work*> of_x, of_y;
    double dgx = 0, dgy = 0;
    for (Scratch& w : scratch) {
      of_x.push_back(&w.x), of_y.push_back(&w.y);
      dgx += w.gamma_x, dgy += w.gamma_y;
    }
    *dsx = of_x_.of_bandwidth(0, dgx, sx_), *dsy = of_y_.of_bandwidth(0, dgy, sy_);
    each_share([&](int64_t begin, int64_t end) { x_.finish(begin, end, of_x), y_.finish(begin, end, of_y); });
  }

 private:
  using Pair = typename Tiles<T>::Pair;

  static Kernel<T> kernel(const Pair& pair, T gamma) { return {pair.s, pair.row_norm, pair.col_norm, gamma}; }

  template <class F>
  void each_share(F&& f) const {
    each_thread(threads_, [&](int64_t t) { f(x_.count() * t / threads_, x_.count() * (t + 1) / threads_); });
  }

  // Calls f(thread, p, q, both samples' pairs of tiles) for all p <= q. begin(thread, -1) comes before a thread's first
  // pair, begin(thread, p) before and end(thread, p) after all pairs of row p.
  template <class F, class Begin, class End>
  void each_pair(F&& f, Begin&& begin, End&& end) const {
    each_thread(threads_, [&](int64_t t) {
      const Array<T> s_x = array<T>(kBlock * kBlock), s_y = array<T>(kBlock * kBlock);
      begin(t, -1);
      each_row_of_tiles(x_.count(), t, threads_, [&](int64_t p) {
        begin(t, p);
        for (int64_t q = p; q < x_.count(); ++q) {
          f(t, p, q, x_.products(p, q, s_x.get()), y_.products(p, q, s_y.get()));
        }
        end(t, p);
      });
      release_gemm(false);
    });
  }

  Precisions<T> of_x_, of_y_;
  Tiles<T> x_, y_;
  int64_t B_, threads_ = 1;
  T gx_, gy_, sx_, sy_;
};

struct Problem {
  Tensor x, y, sx, sy;
  bool wide;
  int64_t G, B;
  Problem(const Tensor& x_, const Tensor& y_, const Tensor& sx_, const Tensor& sy_) : G(x_.size(0)), B(x_.size(1)) {
    wide = x_.scalar_type() == at::kDouble;
    auto cast = [&](const Tensor& t) { return t.to(wide ? at::kDouble : at::kFloat).contiguous(); };
    x = cast(x_), y = cast(y_), sx = cast(sx_), sy = cast(sy_);
  }
  template <class T, class F>
  void each(T* dx, T* dy, F&& f) const {
    const int64_t Dx = x.size(2), Dy = y.size(2);
    each_group(G, 1.0 * B * B * (Dx + Dy), [&](int64_t g, int64_t threads) {
      auto side = [&](const Tensor& t, T* gradient, int64_t D) {
        return Side<T>{t.const_data_ptr<T>() + g * B * D, B, gradient ? gradient + g * B * D : nullptr};
      };
      const T width_x = sx.const_data_ptr<T>()[g], width_y = sy.const_data_ptr<T>()[g];
      Hsic<T> one(side(x, dx, Dx), Dx, width_x, side(y, dy, Dy), Dy, width_y, threads);
      f(one, g);
    });
  }
};

std::tuple<Tensor, Tensor> rbf_hsic(const Tensor& x, const Tensor& y, const Tensor& sx, const Tensor& sy) {
  const Problem c(x, y, sx, sy);
  const auto options = c.x.options().dtype(at::kDouble);
  Tensor products = at::empty({c.G, 3}, options), rows = at::empty({c.G, 2, c.B}, options);
  double *p = products.mutable_data_ptr<double>(), *r = rows.mutable_data_ptr<double>();
  auto run = [&](auto& one, int64_t g) { one.forward(p + 3 * g, r + 2 * c.B * g); };
  c.wide ? c.each<double>(nullptr, nullptr, run) : c.each<float>(nullptr, nullptr, run);
  return {products, rows};
}

template <class T>
void gradients_of(const Problem& c, const double* rows, const double* g, Tensor& dx, Tensor& dy, Tensor& dsx,
                  Tensor& dsy) {
  auto at = [](Tensor& t) { return t.numel() ? t.mutable_data_ptr<T>() : nullptr; };
  T *of_x = at(dsx), *of_y = at(dsy);
  c.each<T>(at(dx), at(dy), [&](Hsic<T>& one, int64_t group) {
    double of_sx, of_sy;
    one.backward(g + 3 * group, rows + 2 * c.B * group, &of_sx, &of_sy);
    if (of_x) of_x[group] = static_cast<T>(of_sx);
    if (of_y) of_y[group] = static_cast<T>(of_sy);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rbf_hsic_grad(const Tensor& x, const Tensor& y, const Tensor& sx,
                                                         const Tensor& sy, const Tensor& rows, const Tensor& g,
                                                         int64_t needs) {
  const Problem c(x, y, sx, sy);
  auto wanted = [&](int64_t bit, const Tensor& t) {
    return at::empty(needs & bit ? t.sizes() : at::IntArrayRef{0}, t.options());
  };
  Tensor dx = wanted(kNeedX, c.x), dy = wanted(kNeedY, c.y), dsx = wanted(kNeedBandwidth, c.sx),
         dsy = wanted(kNeedBandwidthY, c.sy);
  const Tensor sums = rows.contiguous(), slopes = g.to(at::kDouble).contiguous();
  (c.wide ? gradients_of<double> : gradients_of<float>)(c, sums.const_data_ptr<double>(),
                                                        slopes.const_data_ptr<double>(), dx, dy, dsx, dsy);
  return {dx.to(x.scalar_type()), dy.to(y.scalar_type()), dsx.to(sx.scalar_type()), dsy.to(sy.scalar_type())};
}

}  // namespace
}  // namespace mk::rbf

TORCH_LIBRARY_IMPL(mi_kernels_cpu, CPU, m) {
  m.impl("rbf_hsic", &mk::rbf::rbf_hsic);
  m.impl("rbf_hsic_grad", &mk::rbf::rbf_hsic_grad);
}
