// Uninitialised arrays.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

namespace mk {

template <class T>
using Buffer = std::unique_ptr<T[]>;

template <class T>
Buffer<T> make_buffer(int64_t n) {
  return Buffer<T>(new T[static_cast<size_t>(std::max<int64_t>(n, 1))]);
}

template <class T>
Buffer<T> make_zeros(int64_t n) {
  return Buffer<T>(new T[static_cast<size_t>(std::max<int64_t>(n, 1))]());
}

}  // namespace mk
