// Flushes subnormal results to zero on the current thread during the lifetime of an object of this type.
//
// Softmax weights and sigmoids of saturated scores lie around 1e-38, and every product with one of them is subnormal:
// x86 processors then take a slow path of a hundred cycles or more. At logits of +-100 a kernel ran 60 times slower.
// Subnormal inputs keep their values; only results are flushed.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace mk {

class FlushSubnormals {
 public:
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
#if defined(__SSE__)
  FlushSubnormals() : before_(_MM_GET_FLUSH_ZERO_MODE()) { _MM_SET_FLUSH_ZERO_MODE(_MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _MM_SET_FLUSH_ZERO_MODE(before_); }

 private:
  unsigned before_;
#else
  FlushSubnormals() {}
#endif
};

}  // namespace mk
