#pragma once
#include "../common/gemm.h"
#include "item.h"
namespace mk::attention {
template <class T> int64_t wide_scratch(const Item<T>&, bool) { return 0; }
template <class T> void run_wide(const Item<T>&, bool, Scratch<T>&) {}
}
