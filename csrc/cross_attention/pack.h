// Copies rows of strided views into the layouts that the kernels read.
#pragma once

#include "item.h"

namespace mk::cross_attention {

// Copies `n` rows of a view, times `factor`, into rows of `width` elements, padded with zeros.
template <class T>
MK_INLINE void pack_rows(const View<T>& view, int64_t first, int64_t n, int64_t features, int64_t width, T factor, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const T* row = view.at(first + i);
    for (int64_t e = 0; e < features; ++e) out[i * width + e] = row[e * view.column] * factor;
    for (int64_t e = features; e < width; ++e) out[i * width + e] = T(0);
  }
}

// Transposes `n` rows of a view, times `factor`, into out [features][length], with zeros after column n.
template <class T>
MK_INLINE void pack_columns(const View<T>& view, int64_t first, int64_t n, int64_t features, int64_t length, T factor, T* out) {
  for (int64_t e = 0; e < features; ++e)
    for (int64_t i = n; i < length; ++i) out[e * length + i] = T(0);
  for (int64_t i = 0; i < n; ++i) {
    const T* row = view.at(first + i);
    for (int64_t e = 0; e < features; ++e) out[e * length + i] = row[e * view.column] * factor;
  }
}

}  // namespace mk::cross_attention
