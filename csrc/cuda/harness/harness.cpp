// The kernels for the settings of one compilation, run by fibers.
//
//   g++ -std=c++17 -O1 -ffp-contract=off -fPIC -shared -DMICROADAM_HARNESS -DMICROADAM_PARAM=Fp32 ... harness.cpp
#include "../block_step.cuh"
#include "../scalars.cuh"
#include "../settings.cuh"
#include "fibers.h"

namespace {

#ifdef MICROADAM_CRAMPED
// Too little space for the window, so that every case takes the ways around that.
struct Traits : microadam::KernelTraits<microadam::Settings> {
  static constexpr bool kIsStaged = false;
};
#else
using Traits = microadam::KernelTraits<microadam::Settings>;
#endif

}  // namespace

// Runs the thread blocks of a launch one after the other. Returns 0 when threads wait for ever.
extern "C" int harness_step(const microadam::Launch* launch, unsigned num_blocks, int reverse) {
  for (unsigned i = 0; i < num_blocks; ++i) {
    harness::block.x = i;
    const auto step = [=](microadam::Shared<Traits>& shared) { microadam::step(*launch, i, shared); };
    if (!harness::run_block<Traits>(reverse, step)) return 0;
  }
  return 1;
}

extern "C" void harness_scalars(const microadam::Launch* launch) {
  for (int i = 0; i < launch->num_tensors; ++i) microadam::compute_scalars(*launch, i);
}

extern "C" int harness_launch_bytes() { return sizeof(microadam::Launch); }
