// One head of one item of one pair, the unit of work of the attention kernels; and the kernels of an instruction set.
//
// Everything here is shared by sources that are compiled for different processors: it is inlined everywhere, so that no copy
// made for one is linked into code for another.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/buffer.h"
#include "../common/simd.h"

namespace mk::cross_attention {

MK_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of features wherever the caller's tensor has them.
template <class T>
struct View {
  const T* data;
  int64_t row, column;  // strides
  MK_INLINE const T* at(int64_t i) const { return data + i * row; }
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
  MK_INLINE int64_t allowed(int64_t i) const { return std::clamp<int64_t>(i + offset + 1, 0, keys); }
  // Queries [first_query(), queries) have a key.
  MK_INLINE int64_t first_query() const { return keys == 0 ? queries : std::clamp<int64_t>(-offset, 0, queries); }
  // Keys [0, reached()) have a query.
  MK_INLINE int64_t reached() const { return queries == 0 ? 0 : allowed(queries - 1); }
};

// Arrays of one thread, handed out of one block.
template <class T>
class Scratch {
 public:
  void reset(int64_t n) {
    if (n > size_) memory_ = make_zeros<T>(size_ = n);
    used_ = 0;
  }
  MK_INLINE T* take(int64_t n) {
    T* p = memory_.get() + used_;
    used_ += round_up(n, 16);
    return p;
  }

 private:
  Buffer<T> memory_;
  int64_t size_ = 0, used_ = 0;
};

// Heads of at most kSmall features may have a kernel of their own; tiles of the others are kTile x kTile. Measured on
// Zen 4: at 9 to 16 features a kernel of its own took up to twice as long as matmuls of tiles.
constexpr int64_t kSmall = 8, kTile = 64, kMostLanes = 16;

// The rows of a tile, as its elementwise steps see them; the queries lie along the lanes.
template <class T>
struct TileRows {
  int64_t first, n;  // queries
  T *top, *sum;      // [kTile]: forward, the running maximum and sum; backward, the shift and delta
};

// small.h and tile.h, compiled for one instruction set.
template <class T>
struct Kernels {
  using Small = void (*)(const Item<T>&, bool backward, Scratch<T>&);
  Small small[kSmall + 1];  // by the larger of both widths; null where wide.h serves
  void (*soften)(const Item<T>&, const TileRows<T>&, int64_t j, int64_t n, int64_t features, T* s, T* out);
  void (*sparsify)(const Item<T>&, const TileRows<T>&, int64_t n, T* s, T* z, int32_t* index);
  void (*differentiate)(const Item<T>&, const TileRows<T>&, int64_t j, int64_t n, T* s, T* d);
  void (*support_means)(const Item<T>&, const TileRows<T>&, int64_t n, const T* s, const T* d);
  void (*transpose)(int64_t n, const T* in, T* out);
};

// The dropout hash of schema.py; vec.h has it for vectors.
MK_INLINE uint32_t mix(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du;
  x ^= x >> 15, x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define MK_LEVELS 1
#endif
Kernels<float> float_kernels_v4();
Kernels<double> double_kernels_v4();
Kernels<float> float_kernels_v3();
Kernels<double> double_kernels_v3();
Kernels<float> float_kernels_base();
Kernels<double> double_kernels_base();

}  // namespace mk::cross_attention
