// table<T, widths...>(): the kernels of one instruction set; `widths` are the padded widths of small heads. The
// including source defines MK_ISA and MK_VECTOR_BYTES (see vec.h).
#pragma once

#include "small.h"
#include "tile.h"

namespace mk::cross_attention {
inline namespace MK_ISA {
namespace {

template <class T, int P>
void small_heads(const Item<T>& it, bool backward, Scratch<T>& scratch) {
  body::small<T, P>(it, backward, scratch);
}

template <class T>
void soften(const Item<T>& it, const TileRows<T>& rows, int64_t j, int64_t n, int64_t features, T* s, T* out) {
  body::soften(it, rows, j, n, features, s, out);
}
template <class T>
void sparsify(const Item<T>& it, const TileRows<T>& rows, int64_t n, T* s, T* z, int32_t* index) {
  body::sparsify(it, rows, n, s, z, index);
}
template <class T>
void differentiate(const Item<T>& it, const TileRows<T>& rows, int64_t j, int64_t n, T* s, T* d) {
  it.sparse ? body::differentiate<T, true>(it, rows, j, n, s, d) : body::differentiate<T, false>(it, rows, j, n, s, d);
}
template <class T>
void support_means(const Item<T>& it, const TileRows<T>& rows, int64_t n, const T* s, const T* d) {
  body::support_means(it, rows, n, s, d);
}
template <class T>
void transpose(int64_t n, const T* in, T* out) {
  body::transpose(n, in, out);
}

template <class T, int... P>
Kernels<T> table() {
  Kernels<T> found{{}, soften<T>, sparsify<T>, differentiate<T>, support_means<T>, transpose<T>};
  [[maybe_unused]] auto enter = [&](int width, typename Kernels<T>::Small kernel) {
    for (int w = width; w > 0 && !found.small[w]; --w) found.small[w] = kernel;
  };
  (enter(P, small_heads<T, P>), ...);
  return found;
}

}  // namespace
}  // namespace MK_ISA
}  // namespace mk::cross_attention
