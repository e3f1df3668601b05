// Attention's kernels for AVX2. Headers shared with other sources are included first, so that they are compiled without
// AVX2.
#include "../common/buffer.h"
#include "item.h"

#if defined(MK_LEVELS)
#include <cmath>
#include <cstdint>
#include <limits>

#define MK_ISA v3
#define MK_VECTOR_BYTES 32
#pragma GCC target("arch=x86-64-v3")
#include "kernels.h"

namespace mk::cross_attention {
Kernels<float> float_kernels_v3() { return table<float, 4, 8>(); }
Kernels<double> double_kernels_v3() { return table<double>(); }
}  // namespace mk::cross_attention
#endif
