// Attention's kernels for a processor that nothing is known of. On x86 it is one without AVX2: small heads go the wide way.
#define MK_ISA base
#define MK_VECTOR_BYTES 16
#include "kernels.h"

namespace mk::attention {
#if defined(MK_LEVELS)
Kernels<float> float_kernels_base() { return table<float>(); }
#else
Kernels<float> float_kernels_base() { return table<float, 4, 8>(); }
#endif
Kernels<double> double_kernels_base() { return table<double>(); }
}  // namespace mk::attention
