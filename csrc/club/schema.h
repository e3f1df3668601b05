// Bits and sizes that mi_kernels/ops/club/schema.py states too; tests/ops/common/test_schemas.py compares the two.
#pragma once

#include <cstdint>

namespace mk::club {

// Gradients that a caller requests.
enum Needs : int64_t { kNeedMu = 1, kNeedLogvar = 2, kNeedY = 4 };

// Moments of each dimension that the forward keeps for the backward.
constexpr int64_t kMoments = 5;

}  // namespace mk::club
