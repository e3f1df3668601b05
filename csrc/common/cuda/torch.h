// Shared by every csrc/<op>/cuda.cpp, and included nowhere else: the current stream, the inputs' device, errors and the
// dispatch key. With MI_CUDA_EMULATOR the same code takes CPU tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>

#include "runtime.h"

#ifdef MI_CUDA_EMULATOR
#define MK_CUDA_KEY CPU
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define MK_CUDA_KEY CUDA
#endif

namespace mk {

#ifdef MI_CUDA_EMULATOR
inline cudaStream_t current_stream() { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(const at::Tensor&) {}
};
#else
inline cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }
struct DeviceGuard {
  explicit DeviceGuard(const at::Tensor& t) : guard(t.device()) {}
  c10::cuda::CUDAGuard guard;
};
#endif

inline void check_launch(cudaError_t error, const char* what) {
  TORCH_CHECK(error == cudaSuccess, what, " could not start: ", cudaGetErrorString(error));
}

template <class T>
const T* pointer_or_null(const std::optional<at::Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}
template <class T>
T* pointer_or_null(at::Tensor& t) {
  return t.numel() ? t.mutable_data_ptr<T>() : nullptr;
}

}  // namespace mk
