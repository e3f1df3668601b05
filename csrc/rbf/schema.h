// Bits that mi_kernels/ops/rbf/schema.py states too; tests/ops/common/test_schemas.py compares the two.
#pragma once

#include <cstdint>

namespace mk::rbf {

// Gradients that a caller requests: of x, of y, and of the bandwidths (MMD has one set, HSIC one per sample).
enum Needs : int64_t { kNeedX = 1, kNeedY = 2, kNeedBandwidth = 4, kNeedBandwidthY = 8 };

}  // namespace mk::rbf
