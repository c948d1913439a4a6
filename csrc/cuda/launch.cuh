// What one launch is given. `microadam_dist/backends/cuda.py` mirrors these structures with ctypes.
//
// Offsets are in elements; a flat state tensor is described in `microadam_dist/layout.py`.
#pragma once

#include "device.cuh"

namespace microadam {

// Block (row, col) of a run begins at start + row * row_stride + col * size.
struct Extent {
  int64 start, row_stride, size;
};

// rows x cols Top-K blocks of `numel` elements, or (num_kept == 0) an interval of `numel` elements on the dense path.
struct Run {
  int64 first_block;  // of the launch
  int64 tensor;       // row of Launch::tensors
  int64 numel, num_kept;
  int64 cols;        // 0: the blocks follow each other in all tensors, no row needs to be found
  int64 is_aligned;  // whether the extents allow vector accesses
  Extent elements, codes, buckets;
  Extent kept;  // in units of one window slot; `start` on the dense path: where its moments begin
};

// One local tensor. Pointers to what a tensor does not have are null.
struct Tensor {
  void* param;
  const void* grad;
  Bf16* param_copy;  // optional second output
  uint8* codes;
  Bf16 *bucket_lo, *bucket_hi;
  uint16* indices;
  Bf16* values;
  float *exp_avg, *exp_avg_sq;
  int64 is_aligned;  // whether all pointers are multiples of 16
};

// The scalars of one step, rounded to fp32.
struct Scalars {
  float lr, eps, decay, grad_scale;
  float beta1, beta2, one_minus_beta1, one_minus_beta2;
  float m_factor, v_factor, m_correction, v_correction;
  int32 num_weights;  // valid slots
  int32 newest_slot;  // step mod window_size
  int32 is_skipped;   // an overflow was found in the gradients: nothing is changed
};

// Runs are found by block: first_runs[i] is the run of block i << kRunShift, and one more run marks the end.
constexpr int kRunShift = 6;

struct Launch {
  Scalars scalars;
  const Scalars* device_scalars;            // if not null, these instead
  const float *m_weights, *v_weights;       // b1^r and b2^r by age r, 0 = newest
  const Run* runs;
  const uint32* first_runs;
  int32* num_skipped;                       // blocks with a non-finite accumulator are added
  int32* dense_flags;                       // one for each run, zero: a dense run counts once
  Tensor tensors[MICROADAM_MAX_TENSORS];
};

}  // namespace microadam
