// The unit of work of the CPU attention kernels (one head of one item of one pair), and the kernels of an instruction
// set.
//
// Sources compiled for different instruction sets share this header. Everything in it is inlined, so that the linker
// cannot use a copy compiled for one instruction set in code for another.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/buffer.h"
#include "../common/simd.h"

namespace mk::cross_attention {

MK_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of features in the caller's tensor, with its strides.
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
  int64_t queries, keys;  // numbers without padding
  int64_t offset;
  T scale;
  bool sparse;
  Dropout dropout;
  T *out, *stat;  // [Tq, Ev], [Tq]; in the backward these are inputs
  View<T> grad_out;
  T *dq, *dk, *dv;

  // Query i may attend to keys [0, allowed(i)).
  MK_INLINE int64_t allowed(int64_t i) const { return std::clamp<int64_t>(i + offset + 1, 0, keys); }
  // Queries [first_query(), queries) have at least one key to attend to.
  MK_INLINE int64_t first_query() const { return keys == 0 ? queries : std::clamp<int64_t>(-offset, 0, queries); }
  // Keys [0, reached()) are attended to by at least one query.
  MK_INLINE int64_t reached() const { return queries == 0 ? 0 : allowed(queries - 1); }
};

// Scratch arrays of one thread, allocated from one block.
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

// Heads of at most kSmall features may have a specialised kernel (small.h); the others are computed in tiles of
// kTile x kTile (wide.h). Measured on Zen 4: at 9 to 16 features a specialised kernel took up to twice as long as
// tiles.
constexpr int64_t kSmall = 8, kTile = 64, kMostLanes = 16;

// The queries of a tile in its elementwise steps; they lie along the vector lanes.
template <class T>
struct TileRows {
  int64_t first, n;  // the first query, and their number
  T *top, *sum;      // [kTile]; forward: running maximum and sum; backward: shift and delta
};

// small.h and tile.h, compiled for one instruction set.
template <class T>
struct Kernels {
  using Small = void (*)(const Item<T>&, bool backward, Scratch<T>&);
  Small small[kSmall + 1];  // index: the larger of E and Ev; null: use wide.h
  void (*soften)(const Item<T>&, const TileRows<T>&, int64_t j, int64_t n, int64_t features, T* s, T* out);
  void (*sparsify)(const Item<T>&, const TileRows<T>&, int64_t n, T* s, T* z, int32_t* index);
  void (*differentiate)(const Item<T>&, const TileRows<T>&, int64_t j, int64_t n, T* s, T* d);
  void (*support_means)(const Item<T>&, const TileRows<T>&, int64_t n, const T* s, const T* d);
  void (*transpose)(int64_t n, const T* in, T* out);
};

// The dropout hash of schema.py; vec.h has the vector version.
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
