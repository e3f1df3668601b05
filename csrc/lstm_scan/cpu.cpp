// LSTM scan on a CPU; mi_kernels/ops/lstm_scan/schema.py has the formulas. In the forward, a thread takes a block of
// rows through all steps by itself: there is no barrier, the packed weight stays in its cache, and the gates of 16
// units are turned into h and c as soon as their tile of W h is computed. In the backward, threads synchronise after
// every window of steps to sum the weights' gradients. 8 H^2 FLOP per row and step forward, 16 H^2 backward; an input
// of D features adds 8 D H and 16 D H. Each row is computed independently, so its bits depend on neither threads nor
// blocks.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "problem.h"
#include "schema.h"

namespace mk::lstm_scan {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

constexpr int64_t kChunk = 256;  // (row, step) pairs that one matmul of dW sums over
constexpr int64_t kTasks = 16;   // tasks of dW, at least, if there are enough steps
constexpr int64_t kChunks = 8;   // chunks per task, if several tasks share columns (their partial sums are added up)
constexpr int64_t kWindow = 16 << 20;  // bytes of pre-activation gradients per window, in the last-level cache
constexpr int64_t kSum = 1 << 19;  // bytes of dW that one task accumulates; they stay in the second-level cache

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
  const T* zeros;  // 8H zeros: the gates of a step without input, and what is prefetched after them
  Projected<T> in;

  struct Scratch {
    Buffer<T> states[2], cells, tiles, x;
    int64_t from, until, stride;  // the steps projected so far, and rows per step in `tiles`
  };
  Scratch scratch() const {
    const int64_t n = kRows * s.padded;
    return {{make_zeros<T>(n), make_zeros<T>(n)}, make_buffer<T>(n),
            make_buffer<T>(in.x ? s.panels * kAhead * kPanel : kRows * kPanel), make_zeros<T>(kAhead * in.width),
            0, 0, 0};
  }

  void run(const Block& block, Scratch& own) const {
    const int64_t H = s.H, rows = static_cast<int64_t>(block.rows.size());
    own.from = own.until = own.stride = 0;
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

  // Computes W x of the next steps in one product, so that the weight is read once for all of them.
  void project(const Block& block, int64_t t, Scratch& own) const {
    own.stride = rounded_rows(block.running(t), static_cast<int64_t>(block.rows.size()));
    own.from = t, own.until = std::min(block.longest(), t + kAhead / own.stride);
    for (int64_t step = t; step < own.until; ++step)
      for (int64_t r = 0, m = block.running(step); r < m; ++r)
        std::copy_n(in.x + ((block.g * s.B + block.rows[r]) * s.T + step) * in.width, in.width,
                    own.x.get() + ((step - t) * own.stride + r) * in.width);
    for (int64_t p = 0; p < s.panels; ++p)
      gemm((own.until - t) * own.stride, kPanel, in.width, in.width, kPanel, kPanel, false, own.x.get(),
           in.weight + (block.g * s.panels + p) * in.width * kPanel, own.tiles.get() + p * kAhead * kPanel);
  }

  void step(const Block& block, int64_t t, Scratch& own) const {
    const int64_t H = s.H, m = block.running(t), most = static_cast<int64_t>(block.rows.size());
    const T* before = own.states[t % 2].get();
    T* after = own.states[(t + 1) % 2].get();
    const bool multiply = t > 0 || h0;
    if (in.x && t == own.until) project(block, t, own);
    if (!in.x && !multiply) std::fill_n(own.tiles.get(), m * kPanel, T(0));
    for (int64_t p = 0; p < s.panels; ++p) {
      const int64_t unit = p * kUnits, n = std::min(kUnits, H - unit), at = block.g * s.panels + p;
      T* tile = own.tiles.get() + (in.x ? p * kAhead + (t - own.from) * own.stride : 0) * kPanel;
      if (multiply)
        gemm(rounded_rows(m, most), kPanel, H, s.padded, kPanel, kPanel, in.x, before, weight + at * H * kPanel, tile);
      for (int64_t r = 0; r < m; ++r) {
        const int64_t row = block.g * s.B + block.rows[r], now = (row * s.T + t) * H + unit;
        T* cell = own.cells.get() + r * s.padded + unit;
        const T* input = gates && t < inputs ? gates + (row * inputs + t) * 4 * H + unit : zeros;
        T* kept = activations ? activations + (row * s.T + t) * 4 * H + unit : nullptr;
        forward_cell(n, ForwardRow<T>{tile + r * kPanel, input, bias + at * kPanel, cell, kept, h + now, c + now,
                                      after + r * s.padded + unit, cell, H, t + 1 < inputs});
      }
    }
  }
};

// Either gates [G, B, inputs, 4H], or x with its weight.
struct Source {
  const Tensor *gates, *x, *weight;
  int64_t inputs;
};

template <class T>
void forward_of(const Shape& s, const Source& source, const Tensor& weight, const OptTensor& bias, const OptTensor& h0,
                const OptTensor& c0, Tensor& h, Tensor& c, Tensor& activations) {
  const int64_t width = source.x ? source.x->size(3) : 0, rows = 4 * s.H, panel = s.panels * kPanel;
  Buffer<T> w = make_buffer<T>(s.G * panel * s.H), b = make_buffer<T>(s.G * panel);
  Buffer<T> projection = make_buffer<T>(s.G * panel * width);
  for (int64_t g = 0; g < s.G; ++g) {
    pack_forward(s, s.H, weight.const_data_ptr<T>() + g * rows * s.H, w.get() + g * panel * s.H);
    if (width)
      pack_forward(s, width, source.weight->const_data_ptr<T>() + g * rows * width,
                   projection.get() + g * panel * width);
    pack_bias(s, bias ? bias->const_data_ptr<T>() + g * rows : nullptr, b.get() + g * panel);
  }
  const Buffer<T> zeros = make_zeros<T>(8 * s.H);
  const ForwardTask<T> task{s,
                            source.inputs,
                            source.gates ? source.gates->const_data_ptr<T>() : nullptr,
                            data<T>(h0),
                            data<T>(c0),
                            w.get(),
                            b.get(),
                            h.mutable_data_ptr<T>(),
                            c.mutable_data_ptr<T>(),
                            activations.numel() ? activations.mutable_data_ptr<T>() : nullptr,
                            zeros.get(),
                            {width, source.x ? source.x->const_data_ptr<T>() : nullptr, projection.get()}};
  const std::vector<Block> blocks = make_blocks(s);
  each_task(static_cast<int64_t>(blocks.size()), s.threads, [&] { return task.scratch(); },
            [&](int64_t k, auto& own) { task.run(blocks[k], own); });
}

// Gradients of the pre-activations, [G, B, steps, 4H], starting at step `first`.
template <class T>
struct Slopes {
  T* data;
  int64_t first, steps, width;
  T* at(int64_t row, int64_t t) const { return data + (row * steps + t - first) * width; }
};

template <class T>
struct BackwardTask {
  const Shape& s;
  const T *weight, *c0, *c, *activations, *g_h, *g_c;  // the weight is packed
  T *dh0, *dc0;
  const T* zeros;  // H zeros, in place of an absent gradient or state
  Projected<T> in;  // x is not read here
  T* dx;

  struct Scratch {
    Buffer<T> d, tile;
  };
  Scratch scratch() const {
    return {make_zeros<T>((dx ? kAhead : kRows) * 4 * s.H), make_buffer<T>(dx ? kAhead * kPanel : 0)};
  }
  struct State {  // W^T d and dc f of the earliest time step processed so far, for the rows of a block
    T *dh, *dc;
  };

  // Processes time steps [first, last), backwards; those from `last` on are done. A row shorter than `last` joins at
  // its own last step, with a gradient of 0 from later steps.
  void run(const Block& block, const State& state, const Slopes<T>& d, int64_t first, int64_t last, Scratch& own) const {
    const int64_t H = s.H, rows = static_cast<int64_t>(block.rows.size());
    // if dx is requested, several steps at a time: their dx is one product
    const int64_t ahead = dx && rows ? kAhead / rows : 1;
    for (int64_t until = std::min(last, block.longest()), from; until > first; until = from) {
      from = std::max(first, until - ahead);
      const int64_t stride = rounded_rows(block.running(from), rows);
      for (int64_t t = until - 1; t >= from; --t) step(block, t, state, d, own.d.get() + (t - from) * stride * 4 * H);
      if (dx) project(block, from, until, stride, own);
    }
  }

  // Fills the steps beyond the lengths with zeros (in `d`, if it holds all steps, and in dx), and writes the gradients
  // of the initial states.
  void finish(const Block& block, const State& state, T* d) const {
    for (int64_t r = 0; r < static_cast<int64_t>(block.rows.size()); ++r) {
      const int64_t H = s.H, row = block.g * s.B + block.rows[r], length = block.lengths[r];
      if (d) std::fill_n(d + (row * s.T + length) * 4 * H, (s.T - length) * 4 * H, T(0));
      if (dx) std::fill_n(dx + (row * s.T + length) * in.width, (s.T - length) * in.width, T(0));
      if (dh0) std::copy_n(state.dh + r * s.padded, H, dh0 + row * H);
      if (dc0) std::copy_n(state.dc + r * s.padded, H, dc0 + row * H);
    }
  }

  void project(const Block& block, int64_t from, int64_t until, int64_t stride, Scratch& own) const {
    for (int64_t j = 0; j < in.width; j += kPanel) {
      const int64_t width = std::min(kPanel, padded_units(in.width) - j), real = std::min(width, in.width - j);
      gemm((until - from) * stride, width, 4 * s.H, 4 * s.H, width, kPanel, false, own.d.get(),
           in.weight + (block.g * padded_units(in.width) + j) * 4 * s.H, own.tile.get());
      for (int64_t t = from; t < until; ++t)
        for (int64_t r = 0, m = block.running(t); r < m; ++r)
          std::copy_n(own.tile.get() + ((t - from) * stride + r) * kPanel, real,
                      dx + ((block.g * s.B + block.rows[r]) * s.T + t) * in.width + j);
    }
  }

  // One time step; `slopes` receives the gradients of its pre-activations, one row per row of the block.
  void step(const Block& block, int64_t t, const State& state, const Slopes<T>& d, T* slopes) const {
    const int64_t H = s.H, m = block.running(t), most = static_cast<int64_t>(block.rows.size());
    for (int64_t r = 0; r < m; ++r) {
      const int64_t row = block.g * s.B + block.rows[r], now = (row * s.T + t) * H;
      const T* before = t > 0 ? c + now - H : (c0 ? c0 + row * H : zeros);
      backward_cell(H, BackwardRow<T>{activations + 4 * now, c + now, before, g_h ? g_h + now : zeros,
                                      g_c ? g_c + now : zeros, state.dh + r * s.padded, state.dc + r * s.padded,
                                      slopes + r * 4 * H, d.at(row, t), t > std::max<int64_t>(1, d.first)});
    }
    if (t == 0 && !dh0) return;
    // rounding up includes rows that have not joined yet; their gradients are 0
    const int64_t m_rounded = rounded_rows(m, most);
    std::fill(slopes + m * 4 * H, slopes + m_rounded * 4 * H, T(0));
    for (int64_t j = 0; j < s.padded; j += kPanel)
      gemm(m_rounded, std::min(kPanel, s.padded - j), 4 * H, 4 * H, std::min(kPanel, s.padded - j), s.padded, false,
           slopes, weight + (block.g * s.padded + j) * 4 * H, state.dh + j);
  }
};

// dW^T = sum over rows and steps of [h_before, 1, x] d^T for one group, [H + 1 + width, 4H]: the gradients of the
// recurrent weight, of the bias and of the input's weight in one matmul. Steps are added one window at a time.
template <class T>
struct WeightGradient {
  const Shape& s;
  int64_t g;
  const T *h, *h0, *zeros;
  Projected<T> in;
  int64_t height = s.H + 1 + in.width, columns = (4 * s.H + kPanel - 1) / kPanel;
  int64_t parts = 1, together = 1;  // together: columns per task; they share a chunk of [h, 1, x]
  Buffer<T> turned, partial;
  std::vector<uint8_t> begun;  // whether a part's panel already holds a sum to add to
  std::vector<const T*> before = {}, inputs = {}, slopes = {};  // h_{t-1}, x_t, d_t of every (row, step) of a window

  WeightGradient(const Shape& s, int64_t g, const T* h, const T* h0, const T* zeros, const Projected<T>& in,
                 int64_t window)
      : s(s), g(g), h(h), h0(h0), zeros(zeros), in(in) {
    const int64_t most = (s.B * window + kChunk - 1) / kChunk;  // chunks per window
    const int64_t fit = std::max<int64_t>(1, kSum / (height * kPanel * static_cast<int64_t>(sizeof(T))));
    const int64_t shares = std::max<int64_t>(1, most / kChunks);
    const int64_t groups = std::clamp((kTasks + shares - 1) / shares, (columns + fit - 1) / fit, columns);
    together = (columns + groups - 1) / groups;
    parts = std::clamp<int64_t>(kTasks / tasks(), 1, shares);
    turned = make_buffer<T>(most * kChunk * height);
    partial = make_buffer<T>(parts * columns * height * kPanel);
    begun.assign(parts * columns, 0);
  }

  int64_t chunks() const { return (static_cast<int64_t>(before.size()) + kChunk - 1) / kChunk; }
  int64_t steps_of(int64_t chunk) const {
    return std::min(kChunk, static_cast<int64_t>(before.size()) - chunk * kChunk);
  }
  int64_t tasks() const { return (columns + together - 1) / together; }
  T* turned_chunk(int64_t chunk) const { return turned.get() + chunk * kChunk * height; }
  T* panel_of(int64_t part, int64_t column) const { return partial.get() + (part * columns + column) * height * kPanel; }

  void turn(int64_t chunk, T* copy) const {
    const int64_t n = steps_of(chunk);
    T* const to = turned_chunk(chunk);
    auto transposed = [&](const std::vector<const T*>& from, int64_t features, T* out) {
      for (int64_t k = 0; k < n; ++k) std::copy_n(from[chunk * kChunk + k], features, copy + k * features);
      rows::transpose(n, features, copy, features, nullptr, out, kChunk);
    };
    transposed(before, s.H, to);
    std::fill_n(to + s.H * kChunk, n, T(1));
    if (in.width) transposed(inputs, in.width, to + (s.H + 1) * kChunk);
  }

  // Copies the gradients of a chunk into a dense panel before they are read many times: in memory steps are 4H apart,
  // which often maps them to the same cache sets.
  void sum(int64_t part, int64_t task, T* panel) {
    for (int64_t chunk = part; chunk < chunks(); chunk += parts)
      for (int64_t column = task * together; column < std::min(columns, (task + 1) * together); ++column) {
        const int64_t at = column * kPanel, n = steps_of(chunk);
        uint8_t& adds = begun[part * columns + column];
        gather(n, std::min(kPanel, 4 * s.H - at), slopes.data() + chunk * kChunk, at, panel);
        gemm(height, kPanel, n, kChunk, kPanel, kPanel, adds, turned_chunk(chunk), panel, panel_of(part, column));
        adds = 1;
      }
  }

  void add(const Slopes<T>& d, int64_t first, int64_t last) {
    before.clear(), inputs.clear(), slopes.clear();
    for (int64_t b = 0; b < s.B; ++b)
      for (int64_t t = first; t < std::min(last, s.length(g, b)); ++t) {
        const int64_t row = g * s.B + b, now = row * s.T + t;
        before.push_back(t ? h + (now - 1) * s.H : (h0 ? h0 + row * s.H : zeros));
        if (in.width) inputs.push_back(in.x + now * in.width);
        slopes.push_back(d.at(row, t));
      }
    each_task(chunks(), s.threads, [&] { return make_buffer<T>(kChunk * std::max(s.H, in.width)); },
              [&](int64_t chunk, auto& copy) { turn(chunk, copy.get()); });
    each_task(parts * tasks(), s.threads, [] { return make_buffer<T>(kChunk * kPanel); },
              [&](int64_t task, auto& panel) { sum(task / tasks(), task % tasks(), panel.get()); });
  }

  void write_column(int64_t column, T* d_weight, T* d_bias, T* d_input_weight) const {
    const int64_t at = column * kPanel, wide = std::min(kPanel, 4 * s.H - at);
    T* total = panel_of(0, column);
    if (!begun[column]) std::fill_n(total, height * kPanel, T(0));
    for (int64_t part = 1; part < parts; ++part)
      if (begun[part * columns + column]) rows::add(height * kPanel, panel_of(part, column), total);
    if (d_weight) rows::transpose(s.H, wide, total, kPanel, nullptr, d_weight + at * s.H, s.H);
    if (d_bias) std::copy_n(total + s.H * kPanel, wide, d_bias + at);
    if (d_input_weight)
      rows::transpose(in.width, wide, total + (s.H + 1) * kPanel, kPanel, nullptr, d_input_weight + at * in.width,
                      in.width);
  }
  void write(T* d_weight, T* d_bias, T* d_input_weight) const {
    each_task(columns, s.threads, [] { return 0; },
              [&](int64_t column, int) { write_column(column, d_weight, d_bias, d_input_weight); });
  }
};

// Gradients that are not requested are empty tensors.
struct Gradients {
  Tensor gates, x, input_weight, weight, bias, h0, c0;
};

template <class T>
void backward_of(const Shape& s, const Source& source, const Tensor& weight, const OptTensor& h0, const OptTensor& c0,
                 const Tensor& h, const Tensor& c, const Tensor& activations, const OptTensor& g_h,
                 const OptTensor& g_c, Gradients& found) {
  auto out = [](Tensor& t) { return t.numel() ? t.mutable_data_ptr<T>() : nullptr; };
  T *const d_gates = out(found.gates), *const dx = out(found.x), *const d_input_weight = out(found.input_weight);
  T *const d_weight = out(found.weight), *const d_bias = out(found.bias);
  const int64_t width = source.x ? source.x->size(3) : 0, across = padded_units(width), height = 4 * s.H;
  Buffer<T> w = make_buffer<T>(s.G * height * s.padded), projection = make_buffer<T>(dx ? s.G * height * across : 0);
  for (int64_t g = 0; g < s.G; ++g) {
    pack_backward(s, s.H, weight.const_data_ptr<T>() + g * height * s.H, w.get() + g * height * s.padded);
    if (dx)
      pack_backward(s, width, source.weight->const_data_ptr<T>() + g * height * width,
                    projection.get() + g * height * across);
  }
  const Buffer<T> zeros = make_zeros<T>(s.H);
  const T* const states = h.const_data_ptr<T>();
  const Projected<T> in{width, source.x ? source.x->const_data_ptr<T>() : nullptr, projection.get()};
  const BackwardTask<T> task{s,           w.get(),      data<T>(c0),   c.const_data_ptr<T>(),
                             activations.const_data_ptr<T>(),
                             data<T>(g_h), data<T>(g_c), out(found.h0), out(found.c0), zeros.get(), in, dx};
  const std::vector<Block> blocks = make_blocks(s);
  std::vector<typename BackwardTask<T>::State> state;
  Buffer<T> dh = make_zeros<T>(s.G * s.B * s.padded), dc = make_zeros<T>(s.G * s.B * s.padded);
  for (int64_t at = 0; const Block& block : blocks) {
    state.push_back({dh.get() + at * s.padded, dc.get() + at * s.padded});
    at += static_cast<int64_t>(block.rows.size());
  }
  // Page faults on fresh memory would cost more than the arithmetic. So the pre-activation gradients and transposed
  // states exist for one window of steps at a time, and stay in cache.
  const int64_t window = std::clamp<int64_t>(kWindow / (s.G * s.B * height * static_cast<int64_t>(sizeof(T))), 1, s.T);
  Buffer<T> some = make_buffer<T>(d_gates ? 0 : s.G * s.B * window * height);
  std::vector<WeightGradient<T>> weights;
  if (d_weight || d_bias || d_input_weight)
    for (int64_t g = 0; g < s.G; ++g)
      weights.emplace_back(s, g, states, data<T>(h0), zeros.get(), d_input_weight ? in : Projected<T>{}, window);
  for (int64_t last = s.T, first; last > 0; last = first) {
    first = std::max<int64_t>(0, last - window);
    const Slopes<T> slopes = d_gates ? Slopes<T>{d_gates, 0, s.T, height}
                                     : Slopes<T>{some.get(), first, window, height};
    each_task(static_cast<int64_t>(blocks.size()), s.threads, [&] { return task.scratch(); },
              [&](int64_t k, auto& own) { task.run(blocks[k], state[k], slopes, first, last, own); });
    for (auto& weight_gradient : weights) weight_gradient.add(slopes, first, last);
  }
  each_task(static_cast<int64_t>(blocks.size()), s.threads, [] { return 0; },
            [&](int64_t k, int) { task.finish(blocks[k], state[k], d_gates); });
  for (int64_t g = 0; g < static_cast<int64_t>(weights.size()); ++g)
    weights[g].write(d_weight ? d_weight + g * height * s.H : nullptr, d_bias ? d_bias + g * height : nullptr,
                     d_input_weight ? d_input_weight + g * height * width : nullptr);
}

// A tensor with huge pages: every call allocates and writes whole sequences, and page faults on small pages can take as
// long as the arithmetic.
Tensor allocated(at::IntArrayRef sizes, const Tensor& like) {
  Tensor t = at::empty(sizes, like.options());
  wish_huge_pages(t.mutable_data_ptr(), t.nbytes());
  return t;
}

Tensor widened(const Tensor& t) { return t.scalar_type() == at::kDouble ? t : t.to(at::kFloat); }
OptTensor widened(const OptTensor& t) { return t ? OptTensor(widened(*t)) : t; }
const int64_t* values(const OptTensor& lengths) { return lengths ? lengths->const_data_ptr<int64_t>() : nullptr; }

using States = std::tuple<Tensor, Tensor, Tensor>;  // h, c and the activations

States states_of(const Shape& s, const Source& source, const Tensor& like, const Tensor& weight, const OptTensor& bias,
                 const OptTensor& h0, const OptTensor& c0, bool keep) {
  Tensor h = allocated({s.G, s.B, s.T, s.H}, like), c = allocated({s.G, s.B, s.T, s.H}, like);
  Tensor activations = keep ? allocated({s.G, s.B, s.T, 4 * s.H}, like) : at::empty({0}, like.options());
  const auto run = like.scalar_type() == at::kDouble ? forward_of<double> : forward_of<float>;
  run(s, source, widened(weight), widened(bias), widened(h0), widened(c0), h, c, activations);
  return {h, c, activations};
}

States scan_forward(const Tensor& gates, const Tensor& weight, const OptTensor& bias, const OptTensor& h0,
                    const OptTensor& c0, const OptTensor& lengths, int64_t steps, bool keep) {
  const Shape s(gates.size(0), gates.size(1), steps, weight.size(2), values(lengths));
  const Tensor wide = widened(gates);
  return states_of(s, {&wide, nullptr, nullptr, gates.size(2)}, wide, weight, bias, h0, c0, keep);
}

States forward(const Tensor& x, const Tensor& input_weight, const Tensor& weight, const OptTensor& bias,
               const OptTensor& h0, const OptTensor& c0, const OptTensor& lengths, bool keep) {
  const Shape s(x.size(0), x.size(1), x.size(2), weight.size(2), values(lengths));
  const Tensor wide = widened(x), projection = widened(input_weight);
  return states_of(s, {nullptr, &wide, &projection, s.T}, wide, weight, bias, h0, c0, keep);
}

// If there is no input x to project, the result includes the gradient of the gates.
Gradients gradients_of(const Source& source, const Tensor& weight, const OptTensor& h0, const OptTensor& c0,
                       const OptTensor& lengths, const Tensor& h, const Tensor& c, const Tensor& activations,
                       const OptTensor& g_h, const OptTensor& g_c, int64_t needs) {
  const Shape s(h.size(0), h.size(1), h.size(2), h.size(3), values(lengths));
  const int64_t width = source.x ? source.x->size(3) : 0;
  auto sequence = [&](bool wanted, int64_t features) {
    return wanted ? allocated({s.G, s.B, s.T, features}, h) : at::empty({0}, h.options());
  };
  auto wanted = [&](int64_t bit, at::IntArrayRef sizes) {
    return at::empty(needs & bit ? sizes : at::IntArrayRef{0}, h.options());
  };
  Gradients found{sequence(!source.x, 4 * s.H),
                  sequence(source.x && needs & kNeedX, width),
                  wanted(source.x ? kNeedInputWeight : 0, {s.G, 4 * s.H, width}),
                  wanted(kNeedWeight, {s.G, 4 * s.H, s.H}),
                  wanted(kNeedBias, {s.G, 4 * s.H}),
                  wanted(kNeedH0, {s.G, s.B, s.H}),
                  wanted(kNeedC0, {s.G, s.B, s.H})};
  const auto run = h.scalar_type() == at::kDouble ? backward_of<double> : backward_of<float>;
  run(s, source, widened(weight), widened(h0), widened(c0), h, c, activations, g_h, g_c, found);
  return found;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    const Tensor& weight, const OptTensor& h0, const OptTensor& c0, const OptTensor& lengths, const Tensor& h,
    const Tensor& c, const Tensor& activations, const OptTensor& g_h, const OptTensor& g_c, int64_t inputs,
    int64_t needs) {
  Gradients found = gradients_of({}, weight, h0, c0, lengths, h, c, activations, g_h, g_c, needs);
  if (inputs < h.size(2)) found.gates = found.gates.narrow(2, 0, inputs).contiguous();
  return {found.gates, found.weight, found.bias, found.h0, found.c0};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& x, const Tensor& input_weight, const Tensor& weight, const OptTensor& h0, const OptTensor& c0,
    const OptTensor& lengths, const Tensor& h, const Tensor& c, const Tensor& activations, const OptTensor& g_h,
    const OptTensor& g_c, int64_t needs) {
  const Tensor wide = widened(x), projection = widened(input_weight);
  const Gradients found = gradients_of({nullptr, &wide, &projection, x.size(2)}, weight, h0, c0, lengths, h, c,
                                       activations, g_h, g_c, needs);
  return {found.x, found.input_weight, found.weight, found.bias, found.h0, found.c0};
}

}  // namespace
}  // namespace mk::lstm_scan

TORCH_LIBRARY_IMPL(mi_kernels_cpu, CPU, m) {
  m.impl("lstm_scan_forward", &mk::lstm_scan::scan_forward);
  m.impl("lstm_scan_backward", &mk::lstm_scan::scan_backward);
  m.impl("lstm_forward", &mk::lstm_scan::forward);
  m.impl("lstm_backward", &mk::lstm_scan::backward);
}
