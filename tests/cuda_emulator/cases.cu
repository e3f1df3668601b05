// Small kernels with known results, some of them incorrect: what the emulator must compute, and what it must detect.
#include "common/cuda/primitives.cuh"

namespace {

using namespace mk;

__global__ void product_16bit(const bf16* a, const bf16* b, float* c) {  // a [16, 16], b [8, 16], c [16, 8]
  bf16* tile = shared_memory<bf16, 1024>();                                    // a, then b twice: ldmatrix loads four
  for (int i = threadIdx.x; i < 16 * 16; i += 32) tile[i] = a[i];
  for (int i = threadIdx.x; i < 16 * 16; i += 32) tile[256 + i] = b[i % 128];
  __syncwarp();
  const int lane = threadIdx.x, row = lane % 16, half = lane / 16;
  uint32_t x[4], y[4];
  ldmatrix_x4(x, tile + row * 16 + half * 8);
  ldmatrix_x4(y, tile + 256 + (lane % 8) * 16 + (lane / 8 % 2) * 8);
  float sum[4] = {0, 0, 0, 0};
  mma_16x8x16<bf16>(sum, x, y);
  for (int r = 0; r < 4; ++r) c[(lane / 4 + r / 2 * 8) * 8 + lane % 4 * 2 + r % 2] = sum[r];
}

__global__ void product_transposed(const fp16* a, const fp16* b, float* c) {  // a [16, 16], b [16, 8], c [16, 8]
  fp16* tile = shared_memory<fp16, 1024>();
  for (int i = threadIdx.x; i < 16 * 16; i += 32) tile[i] = a[i];
  for (int i = threadIdx.x; i < 16 * 8; i += 32) tile[256 + i] = b[i];
  __syncwarp();
  const int lane = threadIdx.x;
  uint32_t x[4], y[4];
  ldmatrix_x4(x, tile + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x4_transposed(y, tile + 256 + lane % 16 * 8);
  float sum[4] = {0, 0, 0, 0};
  mma_16x8x16<fp16>(sum, x, y);
  for (int r = 0; r < 4; ++r) c[(lane / 4 + r / 2 * 8) * 8 + lane % 4 * 2 + r % 2] = sum[r];
}

__global__ void product_tf32(const float* a, const float* b, float* c) {  // a [16, 8], b [8, 8] (n, k), c [16, 8]
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const uint32_t x[4] = {to_tf32(a[g * 8 + t]), to_tf32(a[(g + 8) * 8 + t]), to_tf32(a[g * 8 + t + 4]),
                         to_tf32(a[(g + 8) * 8 + t + 4])};
  const uint32_t y[2] = {to_tf32(b[g * 8 + t]), to_tf32(b[g * 8 + t + 4])};
  float sum[4] = {0, 0, 0, 0};
  mma_16x8x8_tf32(sum, x, y);
  for (int r = 0; r < 4; ++r) c[(g + r / 2 * 8) * 8 + 2 * t + r % 2] = sum[r];
}

// Reverses 128 values through shared memory. It is correct only with both `barrier` and `wait`.
__global__ void reverse(const float* in, float* out, int barrier, int wait) {
  float* s = shared_memory<float, 512>();
  if (threadIdx.x < 32) copy_async_16(s + 4 * threadIdx.x, in + 4 * threadIdx.x, 16);
  copy_async_commit();
  if (wait) copy_async_wait<0>();
  if (barrier) __syncthreads();
  out[threadIdx.x] = s[127 - threadIdx.x];
}

__global__ void warp_sums(const float* in, float* out) {
  float v = in[threadIdx.x];
  for (int mask = 16; mask; mask /= 2) v += __shfl_xor_sync(0xffffffff, v, mask);
  out[threadIdx.x] = v + __shfl_sync(0xffffffff, in[threadIdx.x], 3);
}

__global__ void unmatched_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void diverged_warp(float* out) {
  float v = 0;
  if (threadIdx.x < 16) v = __shfl_xor_sync(0xffffffff, 1.0f, 1);
  else __syncwarp();
  out[0] = v;
}

__global__ void global_sum(int* cell, int* out) {  // every block adds, then every block reads
  if (threadIdx.x == 0) atomicAdd(cell, 1);
  grid_barrier();
  if (threadIdx.x == 0) out[blockIdx.x] = *cell;
}

__global__ void halves(const float* in, float* out, uint16_t* bits, int n) {
  for (int i = threadIdx.x; i < n; i += 32) {
    const fp16 h = from_float<fp16>(in[i]);
    bits[i] = h.bits, out[i] = to_float(h);
  }
}

template <class F>
int guarded(F f) {
  try {
    f();
  } catch (const std::runtime_error&) {
    return 1;
  }
  return 0;
}

}  // namespace

extern "C" {
void case_product_16bit(const mk::bf16* a, const mk::bf16* b, float* c) {
  mk::launch(product_16bit, dim3(1), 32, 1024, nullptr, a, b, c);
}
void case_product_transposed(const mk::fp16* a, const mk::fp16* b, float* c) {
  mk::launch(product_transposed, dim3(1), 32, 1024, nullptr, a, b, c);
}
void case_product_tf32(const float* a, const float* b, float* c) {
  mk::launch(product_tf32, dim3(1), 32, 0, nullptr, a, b, c);
}
int case_reverse(const float* in, float* out, int barrier, int wait) {
  return guarded([&] { mk::launch(reverse, dim3(1), 128, 512, nullptr, in, out, barrier, wait); });
}
void case_warp_sums(const float* in, float* out) { mk::launch(warp_sums, dim3(1), 64, 0, nullptr, in, out); }
int case_unmatched_barrier() { return guarded([] { mk::launch(unmatched_barrier, dim3(1), 64, 0, nullptr); }); }
int case_diverged_warp(float* out) { return guarded([&] { mk::launch(diverged_warp, dim3(1), 32, 0, nullptr, out); }); }
void case_global_sum(int* cell, int* out, int blocks) {
  mk::launch_cooperative(global_sum, dim3(blocks), 64, 0, nullptr, cell, out);
}
void case_halves(const float* in, float* out, uint16_t* bits, int n) {
  mk::launch(halves, dim3(1), 32, 0, nullptr, in, out, bits, n);
}
}
