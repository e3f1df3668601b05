// Bits, activations and tile sizes that mi_kernels/ops/mlp_critic/schema.py states too;
// tests/ops/common/test_schemas.py compares the two.
#pragma once

#include <cstdint>

namespace mk::mlp_critic {

enum Stats : int64_t { kRowLse = 1, kColLse = 2, kRowSoftplus = 4, kClippedRowLse = 8 };

// The values that the operators' string arguments accept; kActivations is in the order of Act.
constexpr const char* kActivations[] = {"relu", "leaky_relu", "tanh", "sigmoid", "elu", "gelu", "silu"};
constexpr const char* kOutputs[] = {"identity", "softplus"};

// A tile on a CPU has at most kTilePairs pairs; its columns are a multiple of kColumnStep.
constexpr int64_t kTilePairs = 64, kColumnStep = 16;

}  // namespace mk::mlp_critic
