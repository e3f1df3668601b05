// Linked into every emulated library: lets a test choose the order of threads and when asynchronous copies land.
#include "common/cuda/primitives.cuh"

extern "C" void emulator_schedule(int descending, int early_copies) {
  mk::emulator::schedule = {descending != 0, early_copies != 0};
}
