// One head of one item of one pair: what every kernel of attention works on.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/buffer.h"

namespace mk::attention {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of features wherever the caller's tensor has them.
template <class T>
struct View {
  const T* data;
  int64_t row, column;  // strides
  const T* at(int64_t i) const { return data + i * row; }
};

struct Dropout {
  bool on;
  uint32_t key, threshold;  // key: the hash of seed, item and head
  double inverse;           // 1 / (1 - p)
};

template <class T>
struct Item {
  View<T> query, key, value;
  int64_t Tq, Tk, E, Ev;
  int64_t queries, keys;  // without padding
  int64_t offset;
  T scale;
  bool sparse;
  Dropout dropout;
  T *out, *stat;  // [Tq, Ev], [Tq]; inputs of the backward
  View<T> grad_out;
  T *dq, *dk, *dv;

  // Query i may look at keys [0, allowed(i)).
  int64_t allowed(int64_t i) const { return std::clamp<int64_t>(i + offset + 1, 0, keys); }
  // Queries [first_query(), queries) have a key.
  int64_t first_query() const { return keys == 0 ? queries : std::clamp<int64_t>(-offset, 0, queries); }
  // Keys [0, reached()) have a query.
  int64_t reached() const { return queries == 0 ? 0 : allowed(queries - 1); }
};

// `n` rows of a view, times `factor`, in rows of `width` with zeros behind.
template <class T>
void pack_rows(const View<T>& view, int64_t first, int64_t n, int64_t features, int64_t width, T factor, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const T* row = view.at(first + i);
    for (int64_t e = 0; e < features; ++e) out[i * width + e] = row[e * view.column] * factor;
    std::fill(out + i * width + features, out + (i + 1) * width, T(0));
  }
}

// `n` rows of a view, times `factor`, as columns: out [features][length], zeros behind column n.
template <class T>
void pack_columns(const View<T>& view, int64_t first, int64_t n, int64_t features, int64_t length, T factor, T* out) {
  for (int64_t e = 0; e < features; ++e) std::fill(out + e * length + n, out + (e + 1) * length, T(0));
  for (int64_t i = 0; i < n; ++i) {
    const T* row = view.at(first + i);
    for (int64_t e = 0; e < features; ++e) out[e * length + i] = row[e * view.column] * factor;
  }
}

// Arrays of one thread, handed out of one block.
template <class T>
class Scratch {
 public:
  void reset(int64_t n) {
    if (n > size_) memory_ = make_zeros<T>(size_ = n);
    used_ = 0;
  }
  T* take(int64_t n) {
    T* p = memory_.get() + used_;
    used_ += round_up(n, 16);
    return p;
  }

 private:
  Buffer<T> memory_;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace mk::attention
