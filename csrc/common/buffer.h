// Uninitialised arrays. Large ones request huge pages; otherwise a kernel that reads tens of MiB for every panel spends
// several per cent of its time on page faults and TLB misses. Small ones are reused.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace mk {

// Keeps a few freed blocks for the next call: page faults on fresh memory take a tenth of a step at small batches.
// take() and keep() never wait for the lock, so a process forked in the middle of a call cannot deadlock in them.
class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = new Pool;  // threads may still hold blocks when statics are destroyed
    return *pool;
  }

  // Returns a kept block of at least `bytes`, or null; sets `bytes` to its size.
  void* take(size_t& bytes) {
    if (2 * bytes < kSmallest || bytes > kLargest) return nullptr;  // no kept block has a suitable size
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    auto best = blocks_.end();
    for (auto it = blocks_.begin(); it != blocks_.end(); ++it)
      if (it->bytes >= bytes && it->bytes <= 2 * bytes && (best == blocks_.end() || it->bytes < best->bytes)) best = it;
    if (best == blocks_.end()) return nullptr;
    void* const memory = best->memory;
    held_ -= bytes = best->bytes;
    *best = blocks_.back();
    blocks_.pop_back();
    return memory;
  }

  // Returns whether the block was kept; if not, the caller frees it.
  bool keep(void* memory, size_t bytes) {
    if (bytes < kSmallest || bytes > kLargest) return false;
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || held_ + bytes > kMost) return false;
    blocks_.push_back({memory, bytes});
    held_ += bytes;
    return true;
  }

  // Frees all kept blocks.
  void drain() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Block& block : blocks_) std::free(block.memory);
    blocks_.clear();
    held_ = 0;
  }

 private:
  static constexpr size_t kSmallest = size_t{64} << 10, kLargest = size_t{4} << 20, kMost = size_t{16} << 20;
  struct Block {
    void* memory;
    size_t bytes;
  };
  std::mutex mutex_;
  std::vector<Block> blocks_;
  size_t held_ = 0;
};

// Under AddressSanitizer arrays are not reused, and the padding behind the last element counts as out of bounds.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kReuse = false;
inline void forbid(void* memory, size_t from, size_t to) {
  ASAN_POISON_MEMORY_REGION(static_cast<char*>(memory) + from, to - from);
}
#else
constexpr bool kReuse = true;
inline void forbid(void*, size_t, size_t) {}
#endif

struct Release {
  size_t bytes = 0;
  void operator()(void* p) const {
    if (!kReuse || !Pool::instance().keep(p, bytes)) std::free(p);
  }
};

template <class T>
using Buffer = std::unique_ptr<T[], Release>;

constexpr size_t kHuge = size_t{2} << 20;

// Requests huge pages for memory that was allocated elsewhere; a failure has no consequences.
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
  const size_t wanted = static_cast<size_t>(std::max<int64_t>(n, 1)) * sizeof(T);
  const size_t alignment = wanted >= 2 * kHuge ? kHuge : kLine;
  size_t bytes = (wanted + alignment - 1) / alignment * alignment;
  void* p = alignment == kLine ? Pool::instance().take(bytes) : nullptr;
  if (!p) p = std::aligned_alloc(alignment, bytes);
  if (!p) throw std::bad_alloc();
  if (alignment == kHuge) wish_huge_pages(p, bytes);
  forbid(p, wanted, bytes);
  return Buffer<T>(static_cast<T*>(p), Release{bytes});
}

template <class T>
Buffer<T> make_zeros(int64_t n) {
  Buffer<T> out = make_buffer<T>(n);
  std::memset(static_cast<void*>(out.get()), 0, static_cast<size_t>(n) * sizeof(T));
  return out;
}

}  // namespace mk
