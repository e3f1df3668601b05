// Runs CUDA kernels on a CPU: the conventions are in csrc/common/cuda/primitives.cuh, which includes this header.
//
// Threads are fibers. A warp runs until all of its threads wait at a block barrier; then the next warp runs. A
// collective gathers the operands of 32 lanes, and the last lane to arrive computes all results. launch() throws an
// exception if threads wait forever, if the lanes of a warp meet in different collectives, and for pointers that are
// misaligned or, in operations on shared memory, outside of it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulated_runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace mk::emulator {

struct Schedule {
  bool descending = false;    // the order of blocks and threads
  bool early_copies = false;  // asynchronous copies land when issued; otherwise when waited for
};
inline Schedule schedule;

struct Copy {
  void* to;
  const void* from;
  int valid;
};

enum class State { ready, at_block, at_warp, at_grid, done };

constexpr int kWords = 8;
struct Warp {
  int arrived = 0, done = 0;
  uint64_t generation = 0;
  const char* operation = nullptr;
  uint64_t in[32][kWords], out[32][kWords];
};

struct Block;
struct Thread {
  uint3 index;
  Block* block;
  int lane;
  Warp* warp;
  State state;
  uint64_t awaited;
  bool started;
  ucontext_t context;
  jmp_buf jump;
  std::vector<std::vector<Copy>> copies;
};

struct Block {
  uint3 index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned char> memory;
  unsigned char* shared;
  size_t shared_bytes;
  uint64_t generation = 0;
  int arrived = 0, done = 0;
};

struct Machine {
  dim3 grid, block;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<unsigned char[]>> stacks;
  uint64_t grid_generation = 0;
  int grid_arrived = 0, threads_alive = 0;
  Thread* current = nullptr;
  std::function<void()> kernel;
  ucontext_t home_context;
  jmp_buf home;
  std::string error;
};
inline Machine machine;
constexpr size_t kStack = 256 * 1024;

inline void to_scheduler() {
  if (!_setjmp(machine.current->jump)) _longjmp(machine.home, 1);
}

[[noreturn]] inline void fail(const std::string& what) {
  const Thread& t = *machine.current;
  machine.error = what + " (block " + std::to_string(t.block->index.x) + "," + std::to_string(t.block->index.y) +
                  ", thread " + std::to_string(t.index.x) + ")";
  _longjmp(machine.home, 1);
}

inline void finish_thread() {
  Thread& t = *machine.current;
  t.state = State::done;
  ++t.block->done, ++t.warp->done, --machine.threads_alive;
  if (t.warp->arrived) fail("a thread ended while its warp waits in " + std::string(t.warp->operation));
}

inline void entry() {
  machine.kernel();
  finish_thread();
  _longjmp(machine.home, 1);
}

inline bool runnable(const Thread& t) {
  switch (t.state) {
    case State::ready: return true;
    case State::at_block: return t.block->generation != t.awaited;
    case State::at_warp: return t.warp->generation != t.awaited;
    case State::at_grid: return machine.grid_generation != t.awaited;
    default: return false;
  }
}

inline void resume(Thread& t, unsigned char* stack) {
  machine.current = &t;
  t.state = State::ready;
  if (_setjmp(machine.home)) return;
  if (t.started) _longjmp(t.jump, 1);
  t.started = true;
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = stack;
  t.context.uc_stack.ss_size = kStack;
  t.context.uc_link = nullptr;
  makecontext(&t.context, reinterpret_cast<void (*)()>(entry), 0);
  setcontext(&t.context);
}

inline void run_resident() {
  const int count = static_cast<int>(machine.blocks[0]->threads.size()), all = count * machine.blocks.size();
  while (static_cast<int>(machine.stacks.size()) < all)
    machine.stacks.push_back(std::unique_ptr<unsigned char[]>(new unsigned char[kStack]));
  machine.threads_alive = all;
  while (machine.threads_alive) {
    bool moved = false;
    for (int k = 0; k < all; k += 32) {  // each warp runs as far as it can: maximal skew between warps
      for (bool warp_moved = true; warp_moved;) {
        warp_moved = false;
        for (int lane = 0; lane < 32; ++lane) {
          const int i = schedule.descending ? all - 1 - k - lane : k + lane;
          Thread& t = machine.blocks[i / count]->threads[i % count];
          while (runnable(t)) {
            moved = warp_moved = true;
            resume(t, machine.stacks[i].get());
            if (!machine.error.empty()) throw std::runtime_error("CUDA emulator: " + machine.error);
          }
        }
      }
    }
    if (!moved) throw std::runtime_error("CUDA emulator: threads wait at barriers that others never reach");
  }
}

inline std::unique_ptr<Block> make_block(unsigned x, unsigned y, unsigned z, int threads, size_t shared) {
  auto b = std::make_unique<Block>();
  b->index = {x, y, z};
  b->warps.resize((threads + 31) / 32);
  b->memory.assign(shared + 256, 0xff);
  b->shared = b->memory.data() + (128 - reinterpret_cast<uintptr_t>(b->memory.data()) % 128);
  b->shared_bytes = shared;
  b->threads.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Thread& t = b->threads[i];
    t.index = {static_cast<unsigned>(i), 0, 0};
    t.block = b.get(), t.lane = i % 32, t.warp = &b->warps[i / 32];
    t.state = State::ready, t.started = false, t.copies.assign(1, {});
  }
  return b;
}

inline void run(dim3 grid, int threads, int shared, bool cooperative, std::function<void()> kernel) {
  if (threads % 32 || threads < 32 || threads > 1024) throw std::runtime_error("CUDA emulator: threads per block");
  if (shared > 227 * 1024) throw std::runtime_error("CUDA emulator: shared memory beyond 227 KiB");
  machine.grid = grid, machine.block = dim3(threads), machine.kernel = std::move(kernel);
  machine.error.clear(), machine.blocks.clear(), machine.grid_arrived = 0;
  const int64_t total = int64_t(grid.x) * grid.y * grid.z;
  for (int64_t k = 0; k < total; ++k) {
    const int64_t i = schedule.descending ? total - 1 - k : k;
    machine.blocks.push_back(make_block(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y, threads, shared));
    if (cooperative && k + 1 < total) continue;
    run_resident();
    machine.blocks.clear();
  }
}

inline void wait_here(State state, uint64_t generation) {
  machine.current->state = state;
  machine.current->awaited = generation;
  to_scheduler();
}

// `compute` reads the operands of all lanes from warp.in and writes the results to warp.out.
template <class F>
void collective(const char* operation, const void* in, size_t in_bytes, void* out, size_t out_bytes, F compute) {
  Thread& t = *machine.current;
  Warp& w = *t.warp;
  if (w.arrived && std::strcmp(w.operation, operation))
    fail("lanes of one warp meet in " + std::string(w.operation) + " and " + operation);
  if (w.done) fail(std::string(operation) + " after a lane of the warp has ended");
  w.operation = operation;
  std::memcpy(w.in[t.lane], in, in_bytes);
  if (++w.arrived == 32) {
    w.arrived = 0;
    compute(w);
    ++w.generation;
  } else {
    wait_here(State::at_warp, w.generation);
  }
  std::memcpy(out, w.out[t.lane], out_bytes);
}

template <class T>
T shuffle(const char* operation, T value, std::function<int(int)> source) {
  static_assert(sizeof(T) <= 8);
  T result;
  collective(operation, &value, sizeof(T), &result, sizeof(T), [&](Warp& w) {
    for (int lane = 0; lane < 32; ++lane) w.out[lane][0] = w.in[source(lane)][0];
  });
  return result;
}

inline const unsigned char* checked_shared(const void* p, size_t bytes, const char* operation) {
  const Block& b = *machine.current->block;
  const auto* c = static_cast<const unsigned char*>(p);
  if (c < b.shared || c + bytes > b.shared + b.shared_bytes) fail(std::string(operation) + " outside shared memory");
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail(std::string(operation) + " at a misaligned address");
  return c;
}

inline void land(const Copy& c) {
  std::memset(c.to, 0, 16);
  std::memcpy(c.to, c.from, c.valid);
}

inline uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

}  // namespace mk::emulator

#define threadIdx (mk::emulator::machine.current->index)
#define blockIdx (mk::emulator::machine.current->block->index)
#define blockDim (mk::emulator::machine.block)
#define gridDim (mk::emulator::machine.grid)

inline void __syncthreads() {
  using namespace mk::emulator;
  Block& b = *machine.current->block;
  if (b.done) fail("__syncthreads after a thread of the block has ended");
  if (++b.arrived == static_cast<int>(b.threads.size())) {
    b.arrived = 0, ++b.generation;
  } else {
    wait_here(State::at_block, b.generation);
  }
}
inline void __syncwarp(unsigned = 0xffffffff) {
  char none = 0;
  mk::emulator::collective("__syncwarp", &none, 1, &none, 1, [](mk::emulator::Warp&) {});
}
template <class T>
T __shfl_sync(unsigned, T v, int from) {
  T result;
  struct {
    T v;
    int from;
  } in{v, from};
  static_assert(sizeof(in) <= 16);
  mk::emulator::collective("__shfl_sync", &in, sizeof(in), &result, sizeof(T), [&](mk::emulator::Warp& w) {
    for (int lane = 0; lane < 32; ++lane) {
      decltype(in) mine;
      std::memcpy(&mine, w.in[lane], sizeof(in));
      std::memcpy(w.out[lane], w.in[mine.from & 31], sizeof(T));
    }
  });
  return result;
}
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return mk::emulator::shuffle<T>("__shfl_xor_sync", v, [=](int lane) { return (lane ^ mask) & 31; });
}
template <class T>
T __shfl_down_sync(unsigned, T v, int delta) {
  return mk::emulator::shuffle<T>("__shfl_down_sync", v, [=](int lane) { return lane + delta > 31 ? lane : lane + delta; });
}
template <class T>
T __shfl_up_sync(unsigned, T v, int delta) {
  return mk::emulator::shuffle<T>("__shfl_up_sync", v, [=](int lane) { return lane < delta ? lane : lane - delta; });
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned result, in = predicate != 0;
  mk::emulator::collective("__ballot_sync", &in, 4, &result, 4, [](mk::emulator::Warp& w) {
    uint64_t all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= (w.in[lane][0] & 1) << lane;
    for (auto& out : w.out) out[0] = all;
  });
  return result;
}
inline int __any_sync(unsigned m, int predicate) { return __ballot_sync(m, predicate) != 0; }
inline int __all_sync(unsigned m, int predicate) { return __ballot_sync(m, predicate) == 0xffffffffu; }
inline void __threadfence() {}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T atomicAdd(T* p, T v) {
  T old = *p;
  *p = old + v;
  return old;
}
inline int atomicMax(int* p, int v) {
  int old = *p;
  *p = std::max(old, v);
  return old;
}
inline uint32_t __float_as_uint(float f) { return mk::emulator::bits_of(f); }
inline float __uint_as_float(uint32_t u) { return mk::emulator::float_of(u); }
inline int __float_as_int(float f) { return static_cast<int>(mk::emulator::bits_of(f)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
using std::max;
using std::min;

namespace mk {

template <class T, int bytes>
T* shared_memory() {
  static_assert(bytes <= kSharedLimit);
  if (bytes != static_cast<int>(emulator::machine.current->block->shared_bytes))
    emulator::fail("the launcher asked for another amount of shared memory than the kernel has");
  return reinterpret_cast<T*>(emulator::machine.current->block->shared);
}

inline void grid_barrier() {
  using namespace emulator;
  const int all = static_cast<int>(machine.blocks.size() * machine.blocks[0]->threads.size());
  if (machine.blocks.size() != size_t(machine.grid.x) * machine.grid.y * machine.grid.z)
    fail("grid_barrier in a kernel that launch_cooperative did not start");
  if (++machine.grid_arrived == all) {
    machine.grid_arrived = 0, ++machine.grid_generation;
  } else {
    wait_here(State::at_grid, machine.grid_generation);
  }
}

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return emulator::float_of(uint32_t(v.bits) << 16); }
inline float to_float(fp16 v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(float(fraction), -24)
                                     : std::ldexp(float(1024 + fraction), exponent - 25);
  return v.bits >> 15 ? -size : size;
}

template <class T>
T from_float(float f);
template <>
inline float from_float<float>(float f) {
  return f;
}
template <>
inline bf16 from_float<bf16>(float f) {
  const uint32_t u = emulator::bits_of(f);
  if (std::isnan(f)) return {0x7fff};
  return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float size = std::fabs(f);
  if (std::isnan(f)) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (size == 0.0f) return {sign};
  int exponent;
  std::frexp(size, &exponent);
  const int unit = std::max(exponent - 11, -24);  // exponent of the last bit's value
  const auto count = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -unit)));
  return {static_cast<uint16_t>(sign | (unit == -24 ? count : ((unit + 24) << 10) + count))};
}
template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}
inline uint32_t to_tf32(float f) { return (emulator::bits_of(f) + 0x1000) & ~0x1fffu; }
inline float fast_exp2(float x) {
  const float r = std::exp2(x);
  return r < 1.17549435e-38f ? 0.0f : r;
}

namespace emulator {
// One lane's operands of an mma instruction. In mma(), read(register, e) returns element e of a register.
struct Operands {
  float c[4];
  uint32_t a[4], b[2];
};
template <class Read>
void mma(const char* name, float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, int depth, Read read) {
  Operands in;
  static_assert(sizeof(in) <= sizeof(uint64_t) * kWords);
  std::memcpy(in.c, c, 16), std::memcpy(in.a, a, 16), std::memcpy(in.b, b, 8);
  collective(name, &in, sizeof(in), c, 16, [&](Warp& w) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      Operands o;
      std::memcpy(&o, w.in[lane], sizeof(o));
      const int g = lane / 4, t = lane % 4, per = depth / 8;  // elements per register
      for (int r = 0; r < 4; ++r)
        for (int e = 0; e < per; ++e) left[g + r % 2 * 8][per * t + e + r / 2 * depth / 2] = read(o.a[r], e);
      for (int r = 0; r < 2; ++r)
        for (int e = 0; e < per; ++e) right[per * t + e + r * depth / 2][g] = read(o.b[r], e);
    }
    for (int lane = 0; lane < 32; ++lane) {
      Operands o;
      std::memcpy(&o, w.in[lane], sizeof(o));
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
        float sum = o.c[r];
        for (int k = 0; k < depth; ++k) sum += left[row][k] * right[k][column];
        o.c[r] = sum;
      }
      std::memcpy(w.out[lane], o.c, 16);
    }
  });
}

inline void ldmatrix(const char* name, uint32_t (&r)[4], const void* row, bool transposed) {
  const void* p = checked_shared(row, 16, name);
  collective(name, &p, sizeof(p), r, 16, [&](Warp& w) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m) {
        uint16_t two[2];
        for (int e = 0; e < 2; ++e) {
          const int line = transposed ? lane % 4 * 2 + e : lane / 4, at = transposed ? lane / 4 : lane % 4 * 2 + e;
          const uint16_t* source;
          std::memcpy(&source, w.in[8 * m + line], sizeof(source));
          two[e] = source[at];
        }
        std::memcpy(reinterpret_cast<unsigned char*>(w.out[lane]) + 4 * m, two, 4);
      }
  });
}
}  // namespace emulator

template <class T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  emulator::mma("mma_16x8x16", c, a, b, 16,
                [](uint32_t r, int e) { return to_float(T{static_cast<uint16_t>(r >> 16 * e)}); });
}
inline void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  emulator::mma("mma_16x8x8_tf32", c, a, b, 8, [](uint32_t r, int) { return emulator::float_of(r & ~0x1fffu); });
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulator::ldmatrix("ldmatrix_x4", r, row, false); }
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  emulator::ldmatrix("ldmatrix_x4_transposed", r, row, true);
}

inline void copy_async_16(void* shared, const void* global, int valid) {
  emulator::checked_shared(shared, 16, "copy_async_16");
  if (valid < 0 || valid > 16) emulator::fail("copy_async_16 of a size outside 0..16");
  if (reinterpret_cast<uintptr_t>(global) % 16) emulator::fail("copy_async_16 from a misaligned address");
  const emulator::Copy c{shared, global, valid};
  if (emulator::schedule.early_copies) return emulator::land(c);
  emulator::machine.current->copies.back().push_back(c);
}
inline void copy_async_commit() { emulator::machine.current->copies.emplace_back(); }
template <int pending>
void copy_async_wait() {
  auto& groups = emulator::machine.current->copies;  // the last group is not committed yet
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const auto& c : groups.front()) emulator::land(c);
    groups.erase(groups.begin());
  }
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, int shared, cudaStream_t, A... arguments) {
  emulator::run(grid, threads, shared, false, [=] { kernel(static_cast<P>(arguments)...); });
  return cudaSuccess;
}
template <class... P, class... A>
cudaError_t launch_cooperative(void (*kernel)(P...), dim3 grid, int threads, int shared, cudaStream_t, A... arguments) {
  emulator::run(grid, threads, shared, true, [=] { kernel(static_cast<P>(arguments)...); });
  return cudaSuccess;
}

}  // namespace mk
