// Gaussian CLUB on a CPU; mi_kernels/ops/club/schema.py has the formulas. The forward passes over y once for its mean
// (twice in fp64), then once over mu, logvar and y: about 15 B D FLOP. The backward is one pass that reads mu, logvar
// and y and writes the gradients: about 30 B D FLOP.
//
// Without logvar, sum_i (v - c_i^2) = 0. It is left out, because its rounding error could exceed a small value of CLUB.
//
// Rows are cut into parts that depend on the shape alone, so results are bitwise independent of the number of threads.
// A part is processed in tiles of 64 rows by 64 columns. A tile's sums stay in registers, in T, and are then added to
// doubles.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "../common/simd.h"
#include "schema.h"

namespace mk::club {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

constexpr int64_t kTile = 64;
constexpr int64_t kParts = 16;
enum Moment : int64_t { kHigh, kLow, kVariance, kPrecision, kWeightedMean };
static_assert(kWeightedMean + 1 == kMoments);
enum Sum : int64_t { kC2, kW, kWM, kCross, kSums };

MK_INLINE float precision(float logvar) {
  return logvar < -88.0f ? std::numeric_limits<float>::infinity() : fast_exp(-logvar);  // fast_exp takes x <= 88
}
MK_INLINE double precision(double logvar) { return fast_exp(-logvar); }

// In the functions below, In is the tensors' type and T that of the arithmetic. Pointers point at the first row and
// column of a tile, which has `n` columns.
template <class In, class T>
MK_INLINE void add_rows(int64_t rows, int64_t n, int64_t stride, const In* y, double* sum) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < n; ++d) sum[d] += static_cast<double>(static_cast<T>(y[i * stride + d]));
}
MK_CLONES void sum_remainders(int64_t rows, int64_t n, int64_t stride, const double* y, const double* mean, double* sum) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < n; ++d) sum[d] += y[i * stride + d] - mean[d];
}

template <class In, class T>
MK_INLINE void add_tile(int64_t rows, int64_t n, int64_t stride, const In* mu, const In* lv, const In* y, const T* high,
                        const T* low, T (&sums)[kSums][kTile]) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = i * stride;
    for (int64_t d = 0; d < n; ++d) {
      const T c = (static_cast<T>(y[at + d]) - high[d]) - low[d], m = (static_cast<T>(mu[at + d]) - high[d]) - low[d];
      const T w = lv ? precision(static_cast<T>(lv[at + d])) : T(1);
      sums[kC2][d] += c * c;
      sums[kW][d] += w;
      sums[kWM][d] += w * m;
      sums[kCross][d] += lv ? w * ((m + m - c) * c) : (m + m) * c;
    }
  }
}

template <class In, class T>
struct Slopes {  // pointers to a tile's first element; gradients whose pointer is null are not computed
  const In *mu, *lv, *y;
  const T *high, *low, *variance, *precision, *weighted_mean;
  In *dmu, *dlv, *dy;
  T scale;
};

template <class In, class T>
MK_INLINE void slope_tile(int64_t rows, int64_t n, int64_t stride, const Slopes<In, T>& s) {
  T high[kTile], low[kTile], variance[kTile], mean[kTile], shift[kTile];  // locals: no store can alias them
  for (int64_t d = 0; d < n; ++d) {
    high[d] = s.high[d], low[d] = s.low[d], variance[d] = s.variance[d];
    mean[d] = s.scale * s.precision[d], shift[d] = s.scale * s.weighted_mean[d];
  }
  const T scale = s.scale;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = i * stride;
    const In *mu = s.mu + at, *y = s.y + at, *lv = s.lv ? s.lv + at : nullptr;
    In *__restrict dmu = s.dmu + at, *__restrict dlv = s.dlv + at, *__restrict dy = s.dy + at;
    T c[kTile], m[kTile], w[kTile];
    for (int64_t d = 0; d < n; ++d) {
      c[d] = (static_cast<T>(y[d]) - high[d]) - low[d];
      m[d] = (static_cast<T>(mu[d]) - high[d]) - low[d];
    }
    if (lv) {
      for (int64_t d = 0; d < n; ++d) w[d] = precision(static_cast<T>(lv[d])) * scale;
    } else {
      for (int64_t d = 0; d < n; ++d) w[d] = scale;
    }
    if (s.dmu)
      for (int64_t d = 0; d < n; ++d) dmu[d] = static_cast<In>(w[d] * c[d]);
    if (s.dlv)
      for (int64_t d = 0; d < n; ++d)
        dlv[d] = static_cast<In>(T(-0.5) * w[d] * (variance[d] + (m[d] + m[d] - c[d]) * c[d]));
    if (s.dy)
      for (int64_t d = 0; d < n; ++d) dy[d] = static_cast<In>(mean[d] * c[d] - shift[d] - w[d] * (c[d] - m[d]));
  }
}

// Tiles of full width have a constant width, so that the compiler unrolls their loops. These are plain functions,
// because target_clones does not work on templates.
#define MK_CLUB_TILES(In, T)                                                                                        \
  MK_CLONES void sum_columns(int64_t rows, int64_t n, int64_t stride, const In* y, double* sum) {                   \
    n == kTile ? add_rows<In, T>(rows, kTile, stride, y, sum) : add_rows<In, T>(rows, n, stride, y, sum);           \
  }                                                                                                                 \
  MK_CLONES void sum_tile(int64_t rows, int64_t n, int64_t stride, const In* mu, const In* lv, const In* y,         \
                          const T* high, const T* low, T(&sums)[kSums][kTile]) {                                    \
    if (lv)                                                                                                         \
      n == kTile ? add_tile<In, T>(rows, kTile, stride, mu, lv, y, high, low, sums)                                 \
                 : add_tile<In, T>(rows, n, stride, mu, lv, y, high, low, sums);                                    \
    else                                                                                                            \
      add_tile<In, T>(rows, n, stride, mu, nullptr, y, high, low, sums);                                            \
  }                                                                                                                 \
  MK_CLONES void write_slopes(int64_t rows, int64_t n, int64_t stride, const Slopes<In, T>& s) {                    \
    n == kTile ? slope_tile<In, T>(rows, kTile, stride, s) : slope_tile<In, T>(rows, n, stride, s);                 \
  }
MK_CLUB_TILES(double, double)
MK_CLUB_TILES(float, float)
MK_CLUB_TILES(c10::BFloat16, float)
MK_CLUB_TILES(c10::Half, float)
#undef MK_CLUB_TILES

struct Shape {
  int64_t G, B, D, parts, rows;  // rows: rows per part, a multiple of kTile
  explicit Shape(const Tensor& mu) : B(mu.size(-2)), D(mu.size(-1)) {
    G = mu.numel() / (B * D);
    const int64_t tiles = (B + kTile - 1) / kTile, per_part = (tiles + kParts - 1) / kParts;
    rows = per_part * kTile;
    parts = (B + rows - 1) / rows;
  }

  // Calls f(group, part, first row, rows of the part) for every part, in parallel if there is enough work.
  template <class F>
  void each_part(F&& f) const {
    const int64_t work = std::max<int64_t>(1, std::min(rows, B) * D);
    at::parallel_for(0, G * parts, std::max<int64_t>(1, (1 << 15) / work), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t p = t % parts;
        f(t / parts, p, p * rows, std::min(rows, B - p * rows));
      }
    });
  }

  template <class F>
  void each_tile(int64_t row, int64_t count, F&& f) const {  // calls f(first row, rows, first column, columns)
    for (int64_t d = 0; d < D; d += kTile)
      for (int64_t i = row; i < row + count; i += kTile)
        f(i, std::min(kTile, row + count - i), d, std::min(kTile, D - d));
  }
};

template <class In>
const In* data(const OptTensor& t) {
  return t ? t->const_data_ptr<In>() : nullptr;
}

// For fp64 inputs there is no wider type to accumulate in, so a second pass over y computes the mean's low part: the
// mean of what remains after subtracting the rounded mean.
template <class Total>
void add_remainders(const Shape& s, const double* y, Total&& total, double* partial, double* moment) {
  const int64_t D = s.D, width = kSums * D;
  s.each_part([&](int64_t g, int64_t p, int64_t row, int64_t count) {
    double* sum = partial + (g * s.parts + p) * width;
    std::fill_n(sum, D, 0.0);
    s.each_tile(row, count, [&](int64_t i, int64_t rows, int64_t d, int64_t n) {
      sum_remainders(rows, n, D, y + (g * s.B + i) * D + d, moment + g * kMoments * D + d, sum + d);
    });
  });
  for (int64_t g = 0; g < s.G; ++g)
    for (int64_t d = 0; d < D; ++d)
      moment[(g * kMoments + kLow) * D + d] = total(g, 0, d) / static_cast<double>(s.B);
}

template <class In, class T>
void forward_of(const Shape& s, const Tensor& mu, const OptTensor& logvar, const Tensor& y, Tensor& value,
                Tensor& moments) {
  const In *y_at = y.const_data_ptr<In>(), *mu_at = mu.const_data_ptr<In>(), *lv_at = data<In>(logvar);
  T *moment = moments.mutable_data_ptr<T>(), *out = value.mutable_data_ptr<T>();
  const int64_t D = s.D, width = kSums * D;
  const std::unique_ptr<double[]> partial(new double[s.G * s.parts * width]());
  s.each_part([&](int64_t g, int64_t p, int64_t row, int64_t count) {
    double* sum = partial.get() + (g * s.parts + p) * width;
    s.each_tile(row, count, [&](int64_t i, int64_t rows, int64_t d, int64_t n) {
      sum_columns(rows, n, D, y_at + (g * s.B + i) * D + d, sum + d);
    });
  });
  const double count_inverse = 1.0 / static_cast<double>(s.B);
  auto total = [&](int64_t g, int64_t sum, int64_t d) {
    double found = 0;
    for (int64_t p = 0; p < s.parts; ++p) found += partial[(g * s.parts + p) * width + sum * D + d];
    return found;
  };
  for (int64_t g = 0; g < s.G; ++g)
    for (int64_t d = 0; d < D; ++d) {
      // the mean is stored as high + low: rounded to one T it would be off by up to half an ulp, which is large for y
      // far from 0
      const double mean = total(g, 0, d) * count_inverse;
      T* at = moment + g * kMoments * D + d;
      at[kHigh * D] = static_cast<T>(mean);
      at[kLow * D] = static_cast<T>(mean - static_cast<double>(at[kHigh * D]));
    }
  if constexpr (std::is_same_v<In, double>) add_remainders(s, y_at, total, partial.get(), moment);
  s.each_part([&](int64_t g, int64_t p, int64_t row, int64_t count) {
    double* sum = partial.get() + (g * s.parts + p) * width;
    std::fill_n(sum, width, 0.0);
    const T* at = moment + g * kMoments * D;
    s.each_tile(row, count, [&](int64_t i, int64_t rows, int64_t d, int64_t n) {
      T sums[kSums][kTile] = {};
      const int64_t first = (g * s.B + i) * D + d;
      sum_tile(rows, n, D, mu_at + first, lv_at ? lv_at + first : nullptr, y_at + first, at + kHigh * D + d,
               at + kLow * D + d, sums);
      for (int64_t k = 0; k < kSums; ++k)
        for (int64_t e = 0; e < n; ++e) sum[k * D + d + e] += sums[k][e];
    });
  });
  for (int64_t g = 0; g < s.G; ++g) {
    double found = 0;
    for (int64_t d = 0; d < D; ++d) {
      const double variance = total(g, kC2, d) * count_inverse, w = total(g, kW, d);
      T* at = moment + g * kMoments * D + d;
      at[kVariance * D] = static_cast<T>(variance);
      at[kPrecision * D] = static_cast<T>(w * count_inverse);
      at[kWeightedMean * D] = static_cast<T>(total(g, kWM, d) * count_inverse);
      found += (lv_at ? variance * w : 0.0) + total(g, kCross, d);
    }
    out[g] = static_cast<T>(0.5 * count_inverse * found);
  }
}

template <class In, class T>
void backward_of(const Shape& s, const Tensor& mu, const OptTensor& logvar, const Tensor& y, const Tensor& moments,
                 const Tensor& g_value, Tensor& dmu, Tensor& dlv, Tensor& dy) {
  const In *y_at = y.const_data_ptr<In>(), *mu_at = mu.const_data_ptr<In>(), *lv_at = data<In>(logvar);
  const T *moment = moments.const_data_ptr<T>(), *slope = g_value.const_data_ptr<T>();
  auto out = [](Tensor& t) { return t.numel() ? t.mutable_data_ptr<In>() : nullptr; };
  In *mu_out = out(dmu), *lv_out = out(dlv), *y_out = out(dy);
  s.each_part([&](int64_t g, int64_t, int64_t row, int64_t count) {
    s.each_tile(row, count, [&](int64_t i, int64_t rows, int64_t d, int64_t n) {
      const int64_t first = (g * s.B + i) * s.D + d;
      const T* at = moment + g * kMoments * s.D + d;
      auto shifted = [&](auto* pointer) { return pointer ? pointer + first : nullptr; };
      const Slopes<In, T> tile{shifted(mu_at), shifted(lv_at), shifted(y_at), at + kHigh * s.D, at + kLow * s.D,
                               at + kVariance * s.D, at + kPrecision * s.D, at + kWeightedMean * s.D,
                               shifted(mu_out), shifted(lv_out), shifted(y_out), slope[g] / static_cast<T>(s.B)};
      write_slopes(rows, n, s.D, tile);
    });
  });
}

// Calls f.template operator()<In, T>() for a tensor type.
template <class F>
void by_type(at::ScalarType type, F&& f) {
  switch (type) {
    case at::kDouble: return f.template operator()<double, double>();
    case at::kFloat: return f.template operator()<float, float>();
    case at::kBFloat16: return f.template operator()<c10::BFloat16, float>();
    default: return f.template operator()<c10::Half, float>();
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& mu, const OptTensor& logvar, const Tensor& y) {
  const Shape s(mu);
  const auto options = mu.options().dtype(mu.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const auto groups = mu.sizes().slice(0, mu.dim() - 2);
  std::vector<int64_t> moment_sizes(groups.begin(), groups.end());
  moment_sizes.insert(moment_sizes.end(), {kMoments, s.D});
  Tensor value = at::empty(groups, options), moments = at::empty(moment_sizes, options);
  by_type(mu.scalar_type(), [&]<class In, class T>() { forward_of<In, T>(s, mu, logvar, y, value, moments); });
  return {value, moments};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& mu, const OptTensor& logvar, const Tensor& y,
                                            const Tensor& moments, const Tensor& g, int64_t needs) {
  const Shape s(mu);
  auto wanted = [&](int64_t bit) { return at::empty(needs & bit ? mu.sizes() : at::IntArrayRef{0}, mu.options()); };
  Tensor dmu = wanted(kNeedMu), dlv = wanted(kNeedLogvar), dy = wanted(kNeedY);
  by_type(mu.scalar_type(),
          [&]<class In, class T>() { backward_of<In, T>(s, mu, logvar, y, moments, g, dmu, dlv, dy); });
  return {dmu, dlv, dy};
}

}  // namespace
}  // namespace mk::club

TORCH_LIBRARY_IMPL(mi_kernels_cpu, CPU, m) {
  m.impl("club_forward", &mk::club::forward);
  m.impl("club_backward", &mk::club::backward);
}
