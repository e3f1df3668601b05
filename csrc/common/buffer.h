// Uninitialised arrays. Large ones ask for huge pages: a kernel that walks through tens of MiB for every panel spends
// several per cent of its time on page faults and on the TLB otherwise.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mk {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <class T>
using Buffer = std::unique_ptr<T[], Free>;

constexpr size_t kHuge = size_t{2} << 20;

// Asks for huge pages in memory that was allocated elsewhere: a wish, refused without harm.
inline void wish_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const size_t begin = (reinterpret_cast<size_t>(memory) + kHuge - 1) / kHuge * kHuge;
  const size_t end = (reinterpret_cast<size_t>(memory) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <class T>
Buffer<T> make_buffer(int64_t n) {
  constexpr size_t kLine = 64;
  const size_t bytes = static_cast<size_t>(std::max<int64_t>(n, 1)) * sizeof(T);
  const size_t alignment = bytes >= 2 * kHuge ? kHuge : kLine;
  void* p = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (!p) throw std::bad_alloc();
  if (alignment == kHuge) wish_huge_pages(p, (bytes + kHuge - 1) / kHuge * kHuge);
  return Buffer<T>(static_cast<T*>(p));
}

template <class T>
Buffer<T> make_zeros(int64_t n) {
  Buffer<T> out = make_buffer<T>(n);
  std::memset(static_cast<void*>(out.get()), 0, static_cast<size_t>(n) * sizeof(T));
  return out;
}

}  // namespace mk
