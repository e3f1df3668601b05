// Shared by the LSTM scan's forward and backward: sizes, the assignment of rows to threads, and packed weights.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "../common/buffer.h"
#include "../common/gemm.h"
#include "../common/rows.h"
#include "../common/subnormals.h"
#include "cell.h"

namespace mk::lstm_scan {

constexpr int64_t kRows = 64;  // rows per block, at most: their states and one tile stay in the second-level cache
constexpr int64_t kAhead = 128;  // (row, step) pairs in one product with the input's weight, at most

constexpr int64_t padded_units(int64_t n) { return (n + kUnits - 1) / kUnits * kUnits; }

struct Shape {
  int64_t G, B, T, H, padded, panels, threads;
  const int64_t* lengths;  // [G, B], or null

  Shape(int64_t groups, int64_t batch, int64_t steps, int64_t hidden, const int64_t* lengths)
      : G(groups), B(batch), T(steps), H(hidden), padded(padded_units(hidden)),
        panels(padded / kUnits), threads(at::in_parallel_region() ? 1 : at::get_num_threads()), lengths(lengths) {}

  int64_t length(int64_t g, int64_t b) const {
    return lengths ? std::clamp<int64_t>(lengths[g * B + b], 0, T) : T;
  }
};

// An input x [G, B, T, width] that the scan itself projects, instead of gates that the caller has projected.
template <class T>
struct Projected {
  int64_t width = 0;
  const T* x = nullptr;
  const T* weight = nullptr;  // packed like the recurrent weight
};

// Rows of one group that a thread takes through all steps by itself. The longest come first, so the rows still running
// at a step are a prefix.
struct Block {
  int64_t g;
  std::vector<int64_t> rows, lengths;

  int64_t running(int64_t t) const {
    int64_t m = static_cast<int64_t>(rows.size());
    while (m > 0 && lengths[m - 1] <= t) --m;
    return m;
  }
  int64_t longest() const { return lengths.empty() ? 0 : lengths[0]; }
};

// Distributes the rows, sorted by length, to the blocks in turn, so that every block gets its share of long rows.
inline std::vector<Block> make_blocks(const Shape& s) {
  const int64_t by_size = (s.B + kRows - 1) / kRows, by_threads = (s.threads + s.G - 1) / s.G;
  const int64_t count = std::max(by_size, std::min(by_threads, (s.B + 7) / 8));
  std::vector<Block> blocks(s.G * count);
  std::vector<int64_t> order(s.B);
  for (int64_t g = 0; g < s.G; ++g) {
    std::iota(order.begin(), order.end(), 0);
    if (s.lengths)
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t a, int64_t b) { return s.length(g, a) > s.length(g, b); });
    for (int64_t k = 0; k < s.B; ++k) {
      Block& block = blocks[g * count + k % count];
      block.g = g;
      block.rows.push_back(order[k]);
      block.lengths.push_back(s.length(g, order[k]));
    }
  }
  return blocks;
}

// Calls f(task, scratch) for every task on whichever thread is free, and make_scratch() once per thread.
template <class Make, class F>
void each_task(int64_t tasks, int64_t threads, Make&& make_scratch, F&& f) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min(threads, tasks);
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    for (int64_t w = begin; w < end; ++w) {
      auto scratch = make_scratch();
      for (int64_t task = next++; task < tasks; task = next++) f(task, scratch);
      release_gemm(false);
    }
  });
}

// brgemm generates a kernel for every number of rows. Rounding up to multiples of 8 bounds how many different numbers
// the rows' lengths lead to.
inline int64_t rounded_rows(int64_t m, int64_t most) { return std::min(most, (m + 7) / 8 * 8); }

// Packs W [4H, width] as the right operand of h W^T: a panel [width, kPanel] per 16 units; padded units are zero.
template <class T>
void pack_forward(const Shape& s, int64_t width, const T* weight, T* out) {
  for (int64_t p = 0; p < s.panels; ++p, out += width * kPanel) {
    const int64_t units = std::min(kUnits, s.H - p * kUnits);
    if (units < kUnits) std::fill_n(out, width * kPanel, T(0));
    for (int64_t gate = 0; gate < 4; ++gate)
      rows::transpose(units, width, weight + (gate * s.H + p * kUnits) * width, width, nullptr, out + gate * kUnits,
                      kPanel);
  }
}

template <class T>
void pack_bias(const Shape& s, const T* bias, T* out) {
  std::fill_n(out, s.panels * kPanel, T(0));
  if (!bias) return;
  for (int64_t gate = 0; gate < 4; ++gate)
    for (int64_t unit = 0; unit < s.H; ++unit)
      out[unit / kUnits * kPanel + gate * kUnits + unit % kUnits] = bias[gate * s.H + unit];
}

// Packs W [4H, columns] as the right operand of d W: panels [4H, kPanel], the last one narrower.
template <class T>
void pack_backward(const Shape& s, int64_t columns, const T* weight, T* out) {
  for (int64_t j = 0; j < padded_units(columns); j += kPanel) {
    const int64_t width = std::min(kPanel, padded_units(columns) - j), real = std::min(width, columns - j);
    T* to = out + j * 4 * s.H;
    for (int64_t k = 0; k < 4 * s.H; ++k, to += width) {
      std::copy_n(weight + k * columns + j, real, to);
      std::fill(to + real, to + width, T(0));
    }
  }
}

}  // namespace mk::lstm_scan
