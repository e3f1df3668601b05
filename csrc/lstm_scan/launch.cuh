// Launchers of the LSTM scan's CUDA kernels: contiguous device arrays in fp32; absent arrays are null pointers.
// mi_kernels/ops/lstm_scan/schema.py has the formulas and the shapes.
#pragma once

#include <cstdint>

#include "../common/cuda/runtime.h"

namespace mk::lstm_scan {

struct Sizes {
  int G, B, T, H;
  int processors;  // multiprocessors of the device: so many blocks are resident at once
};

struct Forward {
  const float *gates, *weight, *bias, *h0, *c0;  // weight [G, H (k), H (unit), 4 gates]
  const int64_t* lengths;
  int inputs;  // steps of gates [G, B, inputs, 4H]
  float *h, *c, *activations;
};

struct Backward {
  const float* weight;  // [G, H (unit), H (k), 4 gates]
  const float *c0, *c, *activations, *g_h, *g_c;
  const int64_t* lengths;
  float *d, *dh0, *dc0;  // d [G, B, T, 4H]
};

cudaError_t forward(const Sizes& sizes, const Forward& f, cudaStream_t stream);
cudaError_t backward(const Sizes& sizes, const Backward& b, cudaStream_t stream);

}  // namespace mk::lstm_scan
