// Limits of the CUDA kernels that mi_kernels/ops/cross_attention/schema.py states too; tests/ops/common/test_schemas.py
// compares the two.
#pragma once

namespace mk::cross_attention {

// The largest number of features per head, and of pairs per launch (a launch's arguments may take 4 KiB).
constexpr int kMostFeatures = 16, kMostPairs = 16;

}  // namespace mk::cross_attention
