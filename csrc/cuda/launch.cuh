// What one launch is given. `microadam_dist/backends/cuda_launch.py`, with `structures.py` beside it, mirrors these
// structures with ctypes.
//
// Offsets are in elements; a flat state tensor is described in `microadam_dist/layout`.
#pragma once

#include "device.cuh"

namespace microadam {

// Block (row, col) of a run begins at start + row * row_stride + col * size.
struct Extent {
  int64 start, row_stride, size;
};

// What the noise of stochastic rounding depends on: element i of the local tensor is element `origin + i` of a
// parameter, the shape of which gives the key.
struct Place {
  int64 origin, shape_key;
};

// rows x cols Top-K blocks of `numel` elements, or (num_kept == 0) an interval of `numel` elements on the dense path.
struct Run {
  int64 first_block;  // of the launch
  int64 tensor;       // row of Launch::tensors
  int64 numel, num_kept;
  int64 cols;  // 0: the blocks follow each other in all tensors, no row needs to be found
  Place place;
  Extent elements, codes, buckets;
  Extent indices, values, scales;  // of one window slot; `values.start` on the dense path: where its moments begin
};

// One local tensor. Pointers to what a tensor does not have, or a replay does not need, are null.
struct Tensor {
  void* param;
  const void* grad;
  uint8* codes;
  Bf16 *bucket_lo, *bucket_hi;  // of codes of 4 and 8 bits
  Bf16* bucket_scale;           // of others
  uint8 *indices, *values;
  Bf16* scales;  // of a packed window
  float *exp_avg, *exp_avg_sq;
  int64* step;  // steps taken before, where they are counted on the device
};

// The scalars of one step, rounded to fp32.
struct Scalars {
  float lr, eps, decay, grad_scale;
  float beta1, beta2, one_minus_beta1, one_minus_beta2;
  float m_factor, v_factor, m_correction, v_correction;
  int32 num_weights;  // valid slots
  int32 newest_slot;  // step mod window_size
  int32 is_skipped;   // an overflow was found in the gradients: nothing is changed
  uint32 step_key;    // of stochastic rounding
};

// What the scalars of a step are computed from where that is done on the device. Null pointers: not given.
struct DeviceInputs {
  double lr, weight_decay;
  const float* lr_fp32;   // the learning rate, if it lies on the device ...
  const double* lr_fp64;  // ... as one of these
  const float *loss_scale, *found_inf;
  const float* factors;  // m_factor, v_factor, m_correction and v_correction by step; the last ones hold on
  int64 num_factors;
  int64 window_size;
  int64 mixed_seed;  // of stochastic rounding
};

// Runs are found by block: first_runs[i] is the run of block i << kRunShift, and one more run marks the end.
constexpr int kRunShift = 6;

constexpr int kMaxTensors = 256;  // the parameters of a launch stay below 32 KiB

struct Launch {
  Scalars scalars;
  Scalars* device_scalars;  // if not null, one for each tensor, instead
  DeviceInputs inputs;
  const float *m_weights, *v_weights;  // b1^r and b2^r by age r, 0 = newest
  const Run* runs;
  const uint32* first_runs;
  int32* num_skipped;  // blocks with a non-finite accumulator are added
  int32* dense_flags;  // one for each run, zero: a dense run counts once
  int64 num_tensors;
  Tensor tensors[kMaxTensors];
};

}  // namespace microadam
