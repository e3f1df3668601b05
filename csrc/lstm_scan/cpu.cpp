// LSTM scan on a CPU (mi_kernels/ops/lstm_scan/schema.py has the formulas). A thread takes a block of rows through all
// steps by itself: no barrier, the packed weight stays in its cache, and the gates of 16 units are turned into h and c
// as soon as their tile of W h is there. 8 H^2 FLOP per row and step forward, 16 H^2 backward, half of them in one
// matmul over all steps at the end. Every row's arithmetic is its own: bits depend on neither threads nor blocks.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "problem.h"

namespace mk::lstm {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

enum Needs : int64_t { kWeight = 1, kBias = 2, kH0 = 4, kC0 = 8 };
constexpr int64_t kChunk = 256;  // steps of rows that one matmul of dW sums over
constexpr int64_t kParts = 16;   // tasks of dW at least, where there are steps enough

template <class T>
const T* data(const OptTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

template <class T>
struct ForwardTask {
  const Shape& s;
  int64_t inputs;
  const T *gates, *h0, *c0, *weight, *bias;  // weight and bias are packed
  T *h, *c, *activations;
  const T* zeros;  // 4H of them: the gates of a step without input

  struct Scratch {
    Buffer<T> states[2], cells, tile;
  };
  Scratch scratch() const {
    const int64_t n = kRows * s.padded;
    return {{make_zeros<T>(n), make_zeros<T>(n)}, make_buffer<T>(n), make_buffer<T>(kRows * kPanel)};
  }

  void run(const Block& block, Scratch& own) const {
    const int64_t H = s.H, rows = static_cast<int64_t>(block.rows.size());
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = block.g * s.B + block.rows[r];
      T *state = own.states[0].get() + r * s.padded, *cell = own.cells.get() + r * s.padded;
      h0 ? std::copy_n(h0 + row * H, H, state) : std::fill_n(state, H, T(0));
      c0 ? std::copy_n(c0 + row * H, H, cell) : std::fill_n(cell, H, T(0));
    }
    for (int64_t t = 0; t < block.longest(); ++t) step(block, t, own);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = (block.g * s.B + block.rows[r]) * s.T + block.lengths[r], n = s.T - block.lengths[r];
      std::fill_n(h + from * H, n * H, T(0));
      std::fill_n(c + from * H, n * H, T(0));
      if (activations) std::fill_n(activations + from * 4 * H, n * 4 * H, T(0));
    }
  }

  void step(const Block& block, int64_t t, Scratch& own) const {
    const int64_t H = s.H, m = block.running(t), most = static_cast<int64_t>(block.rows.size());
    const T* before = own.states[t % 2].get();
    T *after = own.states[(t + 1) % 2].get(), *tile = own.tile.get();
    const bool multiply = t > 0 || h0;
    if (!multiply) std::fill_n(tile, m * kPanel, T(0));
    for (int64_t p = 0; p < s.panels; ++p) {
      const int64_t unit = p * kUnits, n = std::min(kUnits, H - unit), at = block.g * s.panels + p;
      if (multiply)
        gemm(rounded_rows(m, most), kPanel, H, s.padded, kPanel, kPanel, false, before, weight + at * H * kPanel, tile);
      for (int64_t r = 0; r < m; ++r) {
        const int64_t row = block.g * s.B + block.rows[r], now = (row * s.T + t) * H + unit;
        T* cell = own.cells.get() + r * s.padded + unit;
        const T* input = t < inputs ? gates + (row * inputs + t) * 4 * H + unit : zeros;
        T* kept = activations ? activations + (row * s.T + t) * 4 * H + unit : nullptr;
        forward_cell(n, ForwardRow<T>{tile + r * kPanel, input, bias + at * kPanel, cell, kept, h + now, c + now,
                                      after + r * s.padded + unit, cell, H, t + 1 < inputs});
      }
    }
  }
};

template <class T>
void forward_of(const Shape& s, int64_t inputs, const Tensor& gates, const Tensor& weight, const OptTensor& bias,
                const OptTensor& h0, const OptTensor& c0, Tensor& h, Tensor& c, Tensor& activations) {
  const int64_t packed = s.panels * s.H * kPanel;
  Buffer<T> w = make_buffer<T>(s.G * packed), b = make_buffer<T>(s.G * s.panels * kPanel);
  for (int64_t g = 0; g < s.G; ++g) {
    pack_forward(s, weight.const_data_ptr<T>() + g * 4 * s.H * s.H, w.get() + g * packed);
    pack_bias(s, bias ? bias->const_data_ptr<T>() + g * 4 * s.H : nullptr, b.get() + g * s.panels * kPanel);
  }
  const Buffer<T> zeros = make_zeros<T>(4 * s.H);
  const ForwardTask<T> task{s,         inputs,
                            gates.const_data_ptr<T>(), data<T>(h0),
                            data<T>(c0), w.get(),
                            b.get(),   h.mutable_data_ptr<T>(),
                            c.mutable_data_ptr<T>(),
                            activations.numel() ? activations.mutable_data_ptr<T>() : nullptr,
                            zeros.get()};
  const std::vector<Block> blocks = make_blocks(s);
  each_task(static_cast<int64_t>(blocks.size()), s.threads, [&] { return task.scratch(); },
            [&](int64_t k, auto& own) { task.run(blocks[k], own); });
}

template <class T>
struct BackwardTask {
  const Shape& s;
  const T *weight, *c0, *h, *c, *activations, *g_h, *g_c;  // the weight is packed
  T *d, *dh0, *dc0;
  const T* zeros;  // H of them: a slope or a state that is not there

  struct Scratch {
    Buffer<T> dh, dc, d;
  };
  Scratch scratch() const {
    return {make_buffer<T>(kRows * s.padded), make_buffer<T>(kRows * s.padded), make_buffer<T>(kRows * 4 * s.H)};
  }

  void run(const Block& block, Scratch& own) const {
    const int64_t H = s.H, rows = static_cast<int64_t>(block.rows.size());
    // rows that end early join later, with nothing behind them
    std::fill_n(own.dh.get(), rows * s.padded, T(0));
    std::fill_n(own.dc.get(), rows * s.padded, T(0));
    std::fill_n(own.d.get(), rows * 4 * H, T(0));
    for (int64_t t = block.longest() - 1; t >= 0; --t) step(block, t, own);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = block.g * s.B + block.rows[r], length = block.lengths[r];
      std::fill_n(d + (row * s.T + length) * 4 * H, (s.T - length) * 4 * H, T(0));
      if (dh0) std::copy_n(own.dh.get() + r * s.padded, H, dh0 + row * H);
      if (dc0) std::copy_n(own.dc.get() + r * s.padded, H, dc0 + row * H);
    }
  }

  void step(const Block& block, int64_t t, Scratch& own) const {
    const int64_t H = s.H, m = block.running(t), most = static_cast<int64_t>(block.rows.size());
    for (int64_t r = 0; r < m; ++r) {
      const int64_t row = block.g * s.B + block.rows[r], now = (row * s.T + t) * H;
      const T* before = t > 0 ? c + now - H : (c0 ? c0 + row * H : zeros);
      backward_cell(H, BackwardRow<T>{activations + 4 * now, c + now, before, g_h ? g_h + now : zeros,
                                      g_c ? g_c + now : zeros, own.dh.get() + r * s.padded,
                                      own.dc.get() + r * s.padded, own.d.get() + r * 4 * H, d + 4 * now, t > 1});
    }
    if (t == 0 && !dh0) return;
    // rounding up computes rows that have not joined yet: their d is zero
    const int64_t m_rounded = rounded_rows(m, most);
    for (int64_t j = 0; j < s.padded; j += kPanel)
      gemm(m_rounded, std::min(kPanel, s.padded - j), 4 * H, 4 * H, std::min(kPanel, s.padded - j), s.padded, false,
           own.d.get(), weight + (block.g * s.padded + j) * 4 * H, own.dh.get() + j);
  }
};

// dW^T [H, 4H] = sum over rows and steps of h_before d^T for one group, a matmul whose row H, of ones, gives dbias.
template <class T>
struct WeightGradient {
  const Shape& s;
  int64_t g;
  const T *h, *h0, *d, *zeros;
  std::vector<const T*> before, slopes;  // of every step that was run: h_{t-1} and d_t
  int64_t chunks = 0, parts = 1, columns = 0;
  Buffer<T> turned, partial;

  WeightGradient(const Shape& s, int64_t g, const T* h, const T* h0, const T* d, const T* zeros)
      : s(s), g(g), h(h), h0(h0), d(d), zeros(zeros) {
    before.reserve(s.B * s.T), slopes.reserve(s.B * s.T);
    for (int64_t b = 0; b < s.B; ++b)
      for (int64_t t = 0; t < s.length(g, b); ++t) {
        const int64_t row = g * s.B + b, now = row * s.T + t;
        before.push_back(t ? h + (now - 1) * s.H : (h0 ? h0 + row * s.H : zeros));
        slopes.push_back(d + now * 4 * s.H);
      }
    chunks = (static_cast<int64_t>(before.size()) + kChunk - 1) / kChunk;
    columns = (4 * s.H + kPanel - 1) / kPanel;
    parts = std::max<int64_t>(1, std::min(chunks, kParts / columns));
    turned = make_buffer<T>(chunks * kChunk * (s.H + 1));
    partial = make_zeros<T>(parts * columns * (s.H + 1) * kPanel);
  }

  int64_t steps_of(int64_t chunk) const {
    return std::min(kChunk, static_cast<int64_t>(before.size()) - chunk * kChunk);
  }
  T* turned_chunk(int64_t chunk) const { return turned.get() + chunk * kChunk * (s.H + 1); }
  T* panel_of(int64_t part, int64_t column) const {
    return partial.get() + (part * columns + column) * (s.H + 1) * kPanel;
  }

  void turn(int64_t chunk, T* copy) const {
    const int64_t n = steps_of(chunk);
    for (int64_t k = 0; k < n; ++k) std::copy_n(before[chunk * kChunk + k], s.H, copy + k * s.H);
    rows::transpose(n, s.H, copy, s.H, nullptr, turned_chunk(chunk), kChunk);
    std::fill_n(turned_chunk(chunk) + s.H * kChunk, n, T(1));
  }

  void add(int64_t part, int64_t column, T* panel) const {
    const int64_t at = column * kPanel, width = std::min(kPanel, 4 * s.H - at);
    const bool in_place = !s.lengths && width == kPanel;  // no step is left out: d is what it is
    for (int64_t chunk = part; chunk < chunks; chunk += parts) {
      const int64_t n = steps_of(chunk);
      const T* const* from = slopes.data() + chunk * kChunk;
      if (!in_place) gather(n, width, from, at, panel);
      gemm(s.H + 1, kPanel, n, kChunk, in_place ? 4 * s.H : kPanel, kPanel, true, turned_chunk(chunk),
           in_place ? from[0] + at : panel, panel_of(part, column));
    }
  }

  void write(int64_t column, T* d_weight, T* d_bias) const {
    const int64_t at = column * kPanel, width = std::min(kPanel, 4 * s.H - at);
    T* sum = panel_of(0, column);
    for (int64_t part = 1; part < parts; ++part) rows::add((s.H + 1) * kPanel, panel_of(part, column), sum);
    if (d_weight) rows::transpose(s.H, width, sum, kPanel, nullptr, d_weight + at * s.H, s.H);
    if (d_bias) std::copy_n(sum + s.H * kPanel, width, d_bias + at);
  }

  void run(T* d_weight, T* d_bias) const {
    each_task(chunks, s.threads, [&] { return make_buffer<T>(kChunk * s.H); },
              [&](int64_t chunk, auto& copy) { turn(chunk, copy.get()); });
    each_task(parts * columns, s.threads, [] { return make_buffer<T>(kChunk * kPanel); },
              [&](int64_t task, auto& panel) { add(task / columns, task % columns, panel.get()); });
    each_task(columns, s.threads, [] { return 0; }, [&](int64_t column, int) { write(column, d_weight, d_bias); });
  }
};

template <class T>
void backward_of(const Shape& s, int64_t needs, const Tensor& weight, const OptTensor& h0, const OptTensor& c0,
                 const Tensor& h, const Tensor& c, const Tensor& activations, const OptTensor& g_h,
                 const OptTensor& g_c, Tensor& d, Tensor& d_weight, Tensor& d_bias, Tensor& dh0, Tensor& dc0) {
  const int64_t packed = 4 * s.H * s.padded;
  Buffer<T> w = make_buffer<T>(s.G * packed);
  for (int64_t g = 0; g < s.G; ++g)
    pack_backward(s, weight.const_data_ptr<T>() + g * 4 * s.H * s.H, w.get() + g * packed);
  const Buffer<T> zeros = make_zeros<T>(s.H);
  auto out = [&](Tensor& t, int64_t bit) { return needs & bit ? t.mutable_data_ptr<T>() : nullptr; };
  const T* states = h.const_data_ptr<T>();
  T* slopes = d.mutable_data_ptr<T>();
  const BackwardTask<T> task{s, w.get(), data<T>(c0), states, c.const_data_ptr<T>(), activations.const_data_ptr<T>(),
                             data<T>(g_h), data<T>(g_c), slopes, out(dh0, kH0), out(dc0, kC0), zeros.get()};
  const std::vector<Block> blocks = make_blocks(s);
  each_task(static_cast<int64_t>(blocks.size()), s.threads, [&] { return task.scratch(); },
            [&](int64_t k, auto& own) { task.run(blocks[k], own); });
  if (!(needs & (kWeight | kBias))) return;
  T *to_weight = out(d_weight, kWeight), *to_bias = out(d_bias, kBias);
  for (int64_t g = 0; g < s.G; ++g)
    WeightGradient<T>(s, g, states, data<T>(h0), slopes, zeros.get())
        .run(to_weight ? to_weight + g * 4 * s.H * s.H : nullptr, to_bias ? to_bias + g * 4 * s.H : nullptr);
}

// Whole sequences are allocated and written at every call: page by page, that can take as long as the arithmetic.
Tensor allocated(at::IntArrayRef sizes, const Tensor& like) {
  Tensor t = at::empty(sizes, like.options());
  wish_huge_pages(t.mutable_data_ptr(), t.nbytes());
  return t;
}

Tensor widened(const Tensor& t) { return t.scalar_type() == at::kDouble ? t : t.to(at::kFloat); }
OptTensor widened(const OptTensor& t) { return t ? OptTensor(widened(*t)) : t; }
const int64_t* values(const OptTensor& lengths) { return lengths ? lengths->const_data_ptr<int64_t>() : nullptr; }

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& gates, const Tensor& weight, const OptTensor& bias,
                                           const OptTensor& h0, const OptTensor& c0, const OptTensor& lengths,
                                           int64_t steps, bool keep) {
  const Shape s(gates.size(0), gates.size(1), steps, weight.size(2), values(lengths));
  const Tensor x = widened(gates), w = widened(weight);
  Tensor h = allocated({s.G, s.B, s.T, s.H}, x), c = allocated({s.G, s.B, s.T, s.H}, x);
  Tensor activations = keep ? allocated({s.G, s.B, s.T, 4 * s.H}, x) : at::empty({0}, x.options());
  const auto run = x.scalar_type() == at::kDouble ? forward_of<double> : forward_of<float>;
  run(s, gates.size(2), x, w, widened(bias), widened(h0), widened(c0), h, c, activations);
  return {h, c, activations};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& weight, const OptTensor& h0, const OptTensor& c0, const OptTensor& lengths, const Tensor& h,
    const Tensor& c, const Tensor& activations, const OptTensor& g_h, const OptTensor& g_c, int64_t inputs,
    int64_t needs) {
  const Shape s(h.size(0), h.size(1), h.size(2), h.size(3), values(lengths));
  auto wanted = [&](int64_t bit, at::IntArrayRef sizes) {
    return at::empty(needs & bit ? sizes : at::IntArrayRef{0}, h.options());
  };
  Tensor d = allocated({s.G, s.B, s.T, 4 * s.H}, h);
  Tensor d_weight = wanted(kWeight, {s.G, 4 * s.H, s.H}), d_bias = wanted(kBias, {s.G, 4 * s.H});
  Tensor dh0 = wanted(kH0, {s.G, s.B, s.H}), dc0 = wanted(kC0, {s.G, s.B, s.H});
  const auto run = h.scalar_type() == at::kDouble ? backward_of<double> : backward_of<float>;
  run(s, needs, widened(weight), widened(h0), widened(c0), h, c, activations, g_h, g_c, d, d_weight, d_bias, dh0, dc0);
  if (inputs < s.T) d = d.narrow(2, 0, inputs).contiguous();
  return {d, d_weight, d_bias, dh0, dc0};
}

}  // namespace
}  // namespace mk::lstm

TORCH_LIBRARY_IMPL(mi_kernels_cpu, CPU, m) {
  m.impl("lstm_scan_forward", &mk::lstm::forward);
  m.impl("lstm_scan_backward", &mk::lstm::backward);
}
