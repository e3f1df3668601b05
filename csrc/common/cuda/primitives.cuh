// Device primitives of every CUDA kernel in csrc/, and the conventions that let the kernels run without a GPU.
//
// Layout of an op's CUDA code:
//   csrc/<op>/*.cuh        kernels, free of torch; they reach the hardware only through CUDA's portable intrinsics
//                          (those that tests/cuda_emulator/emulator.h has) and the functions of this header
//   csrc/<op>/launch.cuh   launcher declarations: raw pointers, sizes and a cudaStream_t, in plain structs
//   csrc/<op>/launch.cu    launchers; plain nvcc, no torch header; kernels start through mk::launch below
//   csrc/<op>/cuda.cpp     torch glue inside #ifdef MI_KERNELS_WITH_CUDA: allocates, reads the current stream through
//                          common/cuda/torch.h, launches; the emulator compiles it too, for CPU tensors
// Rules: shared memory is dynamic and comes from shared_memory<T, bytes>(); warp collectives run with all 32 lanes; a
// block is a whole number of warps; 16-bit floats are the structs below (CUDA's own headers do not compile everywhere).
//
// With MI_CUDA_EMULATOR, g++ compiles the same .cu files: tests/cuda_emulator/emulator.h runs each thread of a block
// as a fiber, barriers and warp collectives included, and defines the functions of this header on the CPU. It poisons
// shared memory, runs threads in ascending and descending order, and makes asynchronous copies land as late or as
// early as they may: a missing barrier, a missing wait or a wrong fragment index changes a result.
#pragma once

#include <cstdint>

namespace mk {

constexpr int kSharedLimit = 163 * 1024;  // bytes per block on sm_80; sm_90 has more, sm_86 and sm_89 have 99 KiB

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace mk

#ifdef MI_CUDA_EMULATOR
#include "emulator.h"
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace mk {

// The block's dynamic shared memory. `bytes` is the size that the launcher requests; it is written into the PTX as a
// comment for tests/cuda_checks.py.
template <class T, int bytes>
__device__ __forceinline__ T* shared_memory() {
  static_assert(bytes <= kSharedLimit);
  asm volatile("// dynamic shared memory: %0" ::"n"(bytes));
  extern __shared__ __align__(128) unsigned char mk_shared[];
  return reinterpret_cast<T*>(mk_shared);
}

// Synchronises all threads of all blocks; the kernel must have been started by launch_cooperative.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
__device__ __forceinline__ float to_float(fp16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}

template <class T>
__device__ __forceinline__ T from_float(float f);
template <>
__device__ __forceinline__ float from_float<float>(float f) {
  return f;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float f) {
  bf16 v;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
  return v;
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float f) {
  fp16 v;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
  return v;
}

// Two 16-bit floats in one register, `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__device__ __forceinline__ uint32_t pack<fp16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// The bits of f as fp32, rounded to the nearest TF32 value.
__device__ __forceinline__ uint32_t to_tf32(float f) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(f));
  return r;
}

// 2^x with an error of at most 2 ulp; results below 2^-126 become 0.
__device__ __forceinline__ float fast_exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// c += a b by one warp, with fp32 accumulation. A register holds two 16-bit elements; with g = lane / 4, t = lane % 4:
//   a[0..3]: rows g, g+8, g, g+8 and k = 2t, 2t+1 (+8 for a[2], a[3]);
//   b[0..1]: column g and k = 2t, 2t+1 (+8 for b[1]);
//   c[0..3]: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b);
template <>
__device__ __forceinline__ void mma_16x8x16<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_16x8x16<fp16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same in TF32: a[0..3]: rows g, g+8, g, g+8 and k = t (+4 for a[2], a[3]); b[0..1]: column g and k = t (+4 for
// b[1]). The hardware ignores the low 13 bits of a and b, so round with to_tf32 first.
__device__ __forceinline__ void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads four 8 x 8 matrices of 16-bit elements (8 rows of 16 bytes). Lane 8 m + r gives the address of row r of matrix
// m, 16-byte aligned in shared memory; r[m] receives elements 2t, 2t+1 of row g of matrix m (transposed: of column g).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Copies 16 bytes from global to shared memory, both 16-byte aligned. Reads only the first `valid` (0..16) bytes; the
// others become 0.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's copy groups are in flight. Other threads see the data after a barrier.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Starts kernel(arguments...) with `shared` bytes of dynamic shared memory.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, int shared, cudaStream_t stream, A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared > 48 * 1024) {
    const cudaError_t raised = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (raised != cudaSuccess) return raised;
  }
  kernel<<<grid, threads, shared, stream>>>(static_cast<P>(arguments)...);
  return cudaGetLastError();
}

// The same as a cooperative launch (all blocks are resident at once), for kernels that call grid_barrier.
template <class... P, class... A>
cudaError_t launch_cooperative(void (*kernel)(P...), dim3 grid, int threads, int shared, cudaStream_t stream,
                               A... arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t raised = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (raised != cudaSuccess) return raised;
  }
  auto start = [&](P... values) {
    void* pointers[] = {static_cast<void*>(&values)...};
    return cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel), grid, dim3(threads), pointers, shared, stream);
  };
  return start(static_cast<P>(arguments)...);
}

}  // namespace mk
#endif
