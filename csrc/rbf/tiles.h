// Samples as tiles of 64 rows: inner products of two tiles, and the gradient of a symmetric sum over pairs of rows.
//
// Samples are packed as z = (x - centre) / unit. The centre is their mean and the unit a power of two near the smallest
// bandwidth, so that squares neither overflow nor underflow. Only pairs of tiles p <= q are formed. brgemm computes a
// tile of inner products, and the caller turns it into W = dL/d(r^2) * 2 ("slopes") while it is in cache; then
//   dz_p -= W z_q (owned by p's thread),   dz_q^T -= z_p^T W (per thread, summed in a fixed order),
// and the parts along z_i itself come from W's row and column sums. With N^2 pairs in all and M = N^2 D FLOP:
// M for the inner products, 2 M for the gradients. Extra memory: 3 copies of the tiles and one gradient per thread.
// Tiles with pairs too near for inner products (near.h) are computed from differences of rows, with as many FLOP but at
// a lower speed.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../common/gemm.h"
#include "../common/rows.h"
#include "kernel.h"
#include "near.h"

namespace mk::rbf {

template <class T>
using Array = std::unique_ptr<T[]>;
template <class T>
Array<T> array(int64_t n) {
  return Array<T>(new T[static_cast<size_t>(std::max<int64_t>(n, 1))]);
}

// A group's kernels: scale = 1 / unit, a power of two, and gamma for samples in these units. A bandwidth of 0, infinity
// or NaN gives NaN.
template <class T>
struct Precisions {
  T scale;
  std::vector<T> gamma;

  Precisions(const T* bandwidth, int64_t count) {
    const T smallest = *std::min_element(bandwidth, bandwidth + count);
    int exponent = 0;
    std::frexp(smallest, &exponent);
    scale = std::isfinite(smallest) && smallest != T(0) ? std::ldexp(T(1), 1 - exponent)
                                                        : std::numeric_limits<T>::quiet_NaN();
    for (int64_t k = 0; k < count; ++k) gamma.push_back(T(0.5) / ((bandwidth[k] * scale) * (bandwidth[k] * scale)));
  }

  double of_bandwidth(int64_t k, double of_gamma, T bandwidth) const {  // converts a gradient of gamma
    return -2.0 * of_gamma * gamma[k] / bandwidth;
  }
};

template <class T>
struct Side {
  const T* rows;
  int64_t count;
  T* gradient;  // null if not requested
};

template <class F>
void each_thread(int64_t threads, F&& f) {
  if (threads == 1) return f(0);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t);
  });
}

// Calls f(p) for thread t's rows of tiles. Rows are dealt to the threads forwards, then backwards, so that every thread
// gets long and short ones.
template <class F>
void each_row_of_tiles(int64_t tiles, int64_t t, int64_t threads, F&& f) {
  for (int64_t p = 0; p < tiles; ++p) {
    const int64_t turn = p % (2 * threads);
    if ((turn < threads ? turn : 2 * threads - 1 - turn) == t) f(p);
  }
}

template <class T>
class Tiles {  // the tiles of one sample, or of two samples one after the other
 public:
  // Accumulators of one thread.
  struct Work {
    Array<T> acc, dzt, col_sum;  // [dblocks][kBlock][kBlock], [tiles][D][kBlock], [tiles][kBlock]
    T row_sum[kBlock], unused[kBlock];
    bool started;
  };

  // The inputs of squared_distances() for a pair of tiles: inner products s [rows(p)][kBlock] and norms. If `direct`, s
  // holds -r^2 / 2 and the norms are 0.
  struct Pair {
    int64_t p, q;
    T* s;
    const T *row_norm, *col_norm;
    bool direct;
  };

  Tiles(const std::vector<Side<T>>& sides, int64_t depth, T scale)
      : D(depth), dblocks_((depth + kBlock - 1) / kBlock), scale_(scale) {
    for (size_t k = 0; k < sides.size(); ++k) {
      gradients_ |= sides[k].gradient != nullptr;
      for (int64_t i = 0; i < sides[k].count; i += kBlock) {
        T* gradient = sides[k].gradient ? sides[k].gradient + i * D : nullptr;
        tiles_.push_back({sides[k].rows + i * D, std::min(kBlock, sides[k].count - i), gradient, static_cast<int>(k)});
      }
    }
    centre_ = array<T>(D);
    set_centre();
    z_ = array<T>(count() * D * kBlock), zt_ = array<T>(count() * D * kBlock), peak_ = array<T>(count());
    if (gradients_) zp_ = array<T>(count() * dblocks_ * kBlock * kBlock), row_sum_ = array<T>(count() * kBlock);
    norm_ = array<T>(count() * kBlock), valid_ = array<T>(count() * kBlock);
  }

  int64_t count() const { return static_cast<int64_t>(tiles_.size()); }
  int64_t rows(int64_t p) const { return tiles_[p].rows; }
  int side(int64_t p) const { return tiles_[p].side; }
  const T* norm(int64_t p) const { return norm_.get() + p * kBlock; }
  const T* valid(int64_t p) const { return valid_.get() + p * kBlock; }

  void pack(int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) pack_tile(p);
  }

  // The pair of tiles p and q; computes their inner products, or distances, in s [kBlock][kBlock].
  Pair products(int64_t p, int64_t q, T* s) const {
    static constexpr T kZeros[kBlock] = {};
    if (far_apart(p, q, s)) return {p, q, s, norm(p), norm(q), false};
    std::vector<T> other(D * kBlock);
    pack_as_given(q, other.data());
    from_differences(rows(p), D, scale_, tiles_[p].at, other.data(), s);
    return {p, q, s, kZeros, kZeros, true};
  }

  // Where the caller adds the row and column sums of a pair's slopes. Direct pairs do not need these sums.
  T* row_sum(const Pair& pair, Work& w) const { return pair.direct ? w.unused : w.row_sum; }
  T* col_sum(const Pair& pair, Work& w) const { return pair.direct ? w.unused : w.col_sum.get() + pair.q * kBlock; }

  void begin(Work& w) const {
    w.col_sum = array<T>(count() * kBlock);
    std::fill_n(w.col_sum.get(), count() * kBlock, T(0));
    if (!gradients_) return;
    w.acc = array<T>(dblocks_ * kBlock * kBlock), w.dzt = array<T>(count() * D * kBlock);
    std::fill_n(w.dzt.get(), count() * D * kBlock, T(0));
  }
  void begin_row(Work& w) const {
    std::fill_n(w.row_sum, kBlock, T(0));
    std::fill_n(w.unused, kBlock, T(0));
    w.started = false;
  }

  // Adds the gradients of a pair of tiles, whose slopes have replaced its inner products. The slope of a row with
  // itself must be 0 and left out of the sums, because it may be far larger than all others.
  void add(const Pair& pair, Work& w) const {
    const int64_t p = pair.p, q = pair.q, n = rows(p);
    T* slopes = pair.s;
    if (pair.direct) return add_differences(pair, w);
    if (tiles_[p].gradient)
      for (int64_t b = 0; b < dblocks_; ++b)
        gemm(n, kBlock, kBlock, w.started, slopes, zp_.get() + (q * dblocks_ + b) * kBlock * kBlock,
             w.acc.get() + b * kBlock * kBlock);
    if (tiles_[q].gradient) {
      std::fill_n(slopes + n * kBlock, (kBlock - n) * kBlock, T(0));
      gemm(D, kBlock, kBlock, true, zt_.get() + p * D * kBlock, slopes, w.dzt.get() + q * D * kBlock);
    }
    w.started = true;
  }

  void end_row(int64_t p, Work& w) {
    T* out = tiles_[p].gradient;
    if (!out) return;
    std::copy_n(w.row_sum, kBlock, row_sum_.get() + p * kBlock);
    if (!w.started) return std::fill_n(out, rows(p) * D, T(0)), void();
    for (int64_t d = 0; d < D; d += kBlock)
      for (int64_t i = 0; i < rows(p); ++i)
        rows::scaled_copy(std::min(kBlock, D - d), w.acc.get() + (d + i) * kBlock, T(-1), out + i * D + d);
  }

  // Writes the gradients of tiles begin to end from the accumulators of all threads.
  void finish(int64_t begin, int64_t end, std::vector<Work*>& work) {
    std::vector<T> back(kBlock * D);
    for (int64_t p = begin; p < end; ++p) {
      T* out = tiles_[p].gradient;
      if (!out) continue;
      T along[kBlock];
      for (int64_t i = 0; i < kBlock; ++i) {
        along[i] = row_sum_[p * kBlock + i];
        for (const Work* w : work) along[i] += w->col_sum[p * kBlock + i];
      }
      T* other = work[0]->dzt.get() + p * D * kBlock;
      for (size_t k = 1; k < work.size(); ++k) rows::add(D * kBlock, work[k]->dzt.get() + p * D * kBlock, other);
      rows::transpose(D, rows(p), other, kBlock, nullptr, back.data(), D);
      for (int64_t i = 0; i < rows(p); ++i)
        rows::step_along(D, along[i], z(p) + i * D, back.data() + i * D, out + i * D);
      if (scale_ != T(1)) rows::scaled_copy(rows(p) * D, out, scale_, out);
    }
  }

 private:
  struct Tile {
    const T* at;
    int64_t rows;
    T* gradient;
    int side;
  };

  const T* z(int64_t p) const { return z_.get() + p * D * kBlock; }

  void set_centre() {
    std::vector<double> total(D, 0.0);
    std::vector<T> part(D);
    int64_t count = 0;
    for (const Tile& tile : tiles_) {
      std::fill(part.begin(), part.end(), T(0));
      for (int64_t i = 0; i < tile.rows; ++i) rows::add(D, tile.at + i * D, part.data());
      for (int64_t d = 0; d < D; ++d) total[d] += static_cast<double>(part[d]);
      count += tile.rows;
    }
    for (int64_t d = 0; d < D; ++d) centre_[d] = static_cast<T>(total[d] / static_cast<double>(count));
  }

  // Computes the inner products of tiles p and q; returns whether they are accurate enough for the distances.
  bool far_apart(int64_t p, int64_t q, T* s) const {
    const T reach = peak_[p] + peak_[q];
    if (!(reach <= T(kLargestNorms))) return false;
    gemm(rows(p), D, D, false, z(p), zt_.get() + q * D * kBlock, s);
    auto set_own = [&](T sign) {
      for (int64_t i = 0; p == q && i < rows(p); ++i) s[i * kBlock + i] = sign * norm(p)[i];
    };
    if (reach > T(kSafeNorms)) {
      set_own(T(-1));  // so that a row and itself do not count as a near pair
      if (any_near(rows(p), norm(p), norm(q), s)) return false;
    }
    set_own(T(1));
    return true;
  }

  void pack_as_given(int64_t q, T* out) const {  // out [D][kBlock], not centred or scaled; zeros beyond the rows
    if (rows(q) < kBlock) std::fill_n(out, D * kBlock, T(0));
    rows::transpose(rows(q), D, tiles_[q].at, D, nullptr, out, kBlock);
  }

  void add_differences(const Pair& pair, Work& w) const {
    const int64_t p = pair.p, q = pair.q;
    T* own = tiles_[p].gradient ? w.acc.get() : nullptr;
    T* other = tiles_[q].gradient ? w.dzt.get() + q * D * kBlock : nullptr;
    if (own && !w.started) std::fill_n(own, dblocks_ * kBlock * kBlock, T(0));
    w.started = true;
    if (!own && !other) return;
    std::vector<T> rows_of_q(D * kBlock);
    pack_as_given(q, rows_of_q.data());
    along_differences(rows(p), D, scale_, tiles_[p].at, rows_of_q.data(), pair.s, own, other);
  }

  void pack_tile(int64_t p) {
    const int64_t n = rows(p);
    T* z = z_.get() + p * D * kBlock;
    for (int64_t i = 0; i < n; ++i) about(D, tiles_[p].at + i * D, centre_.get(), scale_, z + i * D);
    T *zt = zt_.get() + p * D * kBlock, *norm = norm_.get() + p * kBlock;
    if (n < kBlock) std::fill_n(zt, D * kBlock, T(0));
    rows::transpose(n, D, z, D, nullptr, zt, kBlock);
    std::fill_n(norm, kBlock, T(0));
    rows::squared_norms(n, D, z, norm);
    peak_[p] = T(0);
    for (int64_t i = 0; i < kBlock; ++i) {
      valid_[p * kBlock + i] = i < n ? T(1) : T(0);
      peak_[p] = norm[i] <= T(kLargestNorms) ? std::max(peak_[p], norm[i]) : std::numeric_limits<T>::infinity();
    }
    if (!gradients_) return;
    T* zp = zp_.get() + p * dblocks_ * kBlock * kBlock;
    std::fill_n(zp, dblocks_ * kBlock * kBlock, T(0));
    for (int64_t b = 0; b < dblocks_; ++b)
      for (int64_t i = 0; i < n; ++i)
        std::copy_n(z + i * D + b * kBlock, std::min(kBlock, D - b * kBlock), zp + (b * kBlock + i) * kBlock);
  }

  int64_t D, dblocks_;
  bool gradients_ = false;
  std::vector<Tile> tiles_;
  T scale_;
  Array<T> centre_, z_, zt_, zp_, norm_, peak_, valid_, row_sum_;
};

// Calls f(group, threads) for each group. Many small groups run in parallel, one thread each; a few large groups run
// one after the other, each on all threads. `flops` is the cost of one group.
template <class F>
void each_group(int64_t groups, double flops, F&& f) {
  const int64_t available = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (groups >= available && groups > 1 && available > 1 && flops * groups > 1e6) {
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) f(g, 1);
    });
  } else {
    for (int64_t g = 0; g < groups; ++g) f(g, flops > 1.5e6 ? available : 1);
  }
}

}  // namespace mk::rbf
