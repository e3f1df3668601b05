// Bits that mi_kernels/ops/lstm_scan/schema.py states too; tests/ops/common/test_schemas.py compares the two.
#pragma once

#include <cstdint>

namespace mk::lstm_scan {

// Gradients that a caller may request besides that of the gates.
enum Needs : int64_t {
  kNeedWeight = 1,
  kNeedBias = 2,
  kNeedH0 = 4,
  kNeedC0 = 8,
  kNeedX = 16,
  kNeedInputWeight = 32
};

}  // namespace mk::lstm_scan
