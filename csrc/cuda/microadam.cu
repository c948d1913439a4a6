// The kernels, for the settings of settings.cuh.
#include "block_step.cuh"
#include "scalars.cuh"
#include "settings.cuh"

using Traits = microadam::KernelTraits<microadam::Settings>;

extern "C" __global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    microadam_step(const __grid_constant__ microadam::Launch launch) {
  __shared__ microadam::Shared<Traits> shared;
  microadam::step(launch, blockIdx.x, shared);
}

// Before microadam_step, where the scalars are computed on the device: one thread for each tensor.
extern "C" __global__ void microadam_scalars(const __grid_constant__ microadam::Launch launch) {
  const int index = blockIdx.x * 32 + threadIdx.x;
  if (index < launch.num_tensors) microadam::compute_scalars(launch, index);
}
