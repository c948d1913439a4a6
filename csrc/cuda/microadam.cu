// The kernels. Compiled for one set of these macros:
//   MICROADAM_PARAM, MICROADAM_GRAD           element types: float, Bf16 or Fp16
//   MICROADAM_REPLAY                          1: there is no gradient, the newest slot is in the window already, and only
//                                             the weights are updated; 0: the whole step
//   MICROADAM_THREADS, MICROADAM_CHUNKS       threads of a block, times 8 elements, times chunks: the longest block
//   MICROADAM_WINDOW_SIZE, MICROADAM_BUCKET_SIZE, MICROADAM_MAX_KEPT
//   MICROADAM_PACKED_WINDOW                   1: 12-bit indices and 8-bit values
//   MICROADAM_MAX_TENSORS                     rows of the table of tensors
//   MICROADAM_MIN_BLOCKS                      thread blocks that shall fit a multiprocessor at once
#include "block_step.cuh"
#include "scalars.cuh"

extern "C" __global__ void __launch_bounds__(MICROADAM_THREADS, MICROADAM_MIN_BLOCKS)
    microadam_step(const __grid_constant__ microadam::Launch launch) {
  __shared__ microadam::Shared shared;
  microadam::step(launch, blockIdx.x, shared);
}

// Before microadam_step, where the scalars are computed on the device: one thread for each tensor.
extern "C" __global__ void microadam_scalars(const __grid_constant__ microadam::Launch launch) {
  const int index = blockIdx.x * 32 + threadIdx.x;
  if (index < launch.num_tensors) microadam::compute_scalars(launch, index);
}
