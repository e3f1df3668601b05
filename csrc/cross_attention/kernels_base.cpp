// Attention's kernels for the baseline build, which assumes no instruction set extension. On x86 these run on
// processors without AVX2, where small heads use wide.h too.
#define MK_ISA base
#define MK_VECTOR_BYTES 16
#include "kernels.h"

namespace mk::cross_attention {
#if defined(MK_LEVELS)
Kernels<float> float_kernels_base() { return table<float>(); }
#else
Kernels<float> float_kernels_base() { return table<float, 4, 8>(); }
#endif
Kernels<double> double_kernels_base() { return table<double>(); }
}  // namespace mk::cross_attention
