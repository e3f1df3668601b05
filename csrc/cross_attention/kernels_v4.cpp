// Attention's kernels for AVX-512. Headers shared with other sources are included first, so that they are compiled
// without AVX-512.
#include "../common/buffer.h"
#include "item.h"

#if defined(MK_LEVELS)
#include <cmath>
#include <cstdint>
#include <limits>

#define MK_ISA v4
#define MK_VECTOR_BYTES 64
#pragma GCC target("arch=x86-64-v4")
#include "kernels.h"

namespace mk::cross_attention {
Kernels<float> float_kernels_v4() { return table<float, 4, 6, 8>(); }
Kernels<double> double_kernels_v4() { return table<double>(); }
}  // namespace mk::cross_attention
#endif
