// The CUDA runtime's types for launcher declarations; the emulator defines its own.
#pragma once

#ifdef MI_CUDA_EMULATOR
#include "emulated_runtime.h"
#else
#include <cuda_runtime_api.h>
#endif
