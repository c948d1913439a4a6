// The scalars of a step computed on the device, from numbers that lie there: a replayed CUDA graph steps on.
#pragma once

#include "launch.cuh"
#include "rounding.cuh"

namespace microadam {

// Once for every tensor, before its step. The same bits as `microadam_dist/arithmetic/scalars.py`: powers come from a
// table.
__device__ __forceinline__ void compute_scalars(const Launch& launch, int index) {
  const DeviceInputs& inputs = launch.inputs;
  Scalars scalars = launch.scalars;
  scalars.is_skipped = inputs.found_inf != nullptr && *inputs.found_inf != 0.f;
  int64* const counter = launch.tensors[index].step;
  const int64 step = *counter;
  if (!scalars.is_skipped) *counter = step + 1;

  double lr = inputs.lr;
  if (inputs.lr_fp32 != nullptr) lr = *inputs.lr_fp32;
  if (inputs.lr_fp64 != nullptr) lr = *inputs.lr_fp64;
  scalars.lr = static_cast<float>(lr);
  scalars.decay = static_cast<float>(1.0 - lr * inputs.weight_decay);
  if (inputs.loss_scale != nullptr) scalars.grad_scale = static_cast<float>(1.0 / *inputs.loss_scale);

  const float* const factors = inputs.factors + 4 * min(step, inputs.num_factors - 1);
  scalars.m_factor = factors[0];
  scalars.v_factor = factors[1];
  scalars.m_correction = factors[2];
  scalars.v_correction = factors[3];
  scalars.num_weights = static_cast<int32>(min(step + 1, inputs.window_size));
  scalars.newest_slot = static_cast<int32>(step % inputs.window_size);
  scalars.step_key = mix(static_cast<uint32>(inputs.mixed_seed + step));
  launch.device_scalars[index] = scalars;
}

}  // namespace microadam
