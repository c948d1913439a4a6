/* The C interface of the fused CPU step. `microadam_dist/backends/cpu.py`, with `structures.py` beside it, mirrors
 * these structures with ctypes.
 *
 * One call updates all tensors of one param group. Offsets are in elements; a flat state tensor is described in
 * `microadam_dist/layout`, the arithmetic in `microadam_dist/arithmetic`.
 */
#ifndef MICROADAM_CPU_H
#define MICROADAM_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MICROADAM_API __attribute__((visibility("default")))

/* Raised with every change of a structure or a signature below. */
#define MICROADAM_CPU_ABI_VERSION 8

enum microadam_dtype { MICROADAM_FP32 = 0, MICROADAM_BF16 = 1, MICROADAM_FP16 = 2 };

enum microadam_isa { MICROADAM_PORTABLE = 0, MICROADAM_AVX2 = 1, MICROADAM_AVX512 = 2 };

/* Block (row, col) of a run begins at start + row * row_stride + col * size. */
typedef struct {
  int64_t start, row_stride, size;
} microadam_extent;

/* What the noise of stochastic rounding depends on: element i of the local tensor is element `origin + i` of a
 * parameter, the shape of which gives the key. */
typedef struct {
  int64_t origin, shape_key;
} microadam_place;

/* rows x cols Top-K blocks of `numel` elements. `indices` (bytes), `values` and `scales` count in units of one window
 * slot. */
typedef struct {
  int64_t rows, cols, numel, num_kept;
  microadam_place place;
  microadam_extent elements, codes, buckets, indices, values, scales;
} microadam_block_run;

/* An interval on the dense path. */
typedef struct {
  int64_t start, numel, state_start;
  microadam_place place;
} microadam_dense_run;

/* The scalars of one step, rounded to fp32 by the caller; weights by age, 0 = newest. */
typedef struct {
  float lr, eps, decay, grad_scale;
  float beta1, beta2, one_minus_beta1, one_minus_beta2;
  float m_factor, v_factor, m_correction, v_correction;
  const float *m_weights, *v_weights;
  int64_t num_weights; /* valid slots */
  int64_t newest_slot; /* step mod window_size */
  int64_t step_key;    /* of stochastic rounding */
} microadam_scalars;

/* Where everything of a tensor lies. */
typedef struct {
  const microadam_block_run* block_runs;
  const microadam_dense_run* dense_runs;
  int64_t num_block_runs, num_dense_runs;
} microadam_layout;

/* One local tensor; every field has 8 bytes. Pointers to what a tensor does not have are null. Without a gradient the
 * newest slot is in the window already, only the weights of the blocks are updated, and dense runs are passed over. */
typedef struct {
  const microadam_layout* layout;
  const microadam_scalars* scalars;
  void* param;
  const void* grad;
  int64_t* counter; /* optional: 1 is added */
  uint8_t* codes;
  uint16_t *bucket_lo, *bucket_hi; /* bf16; of codes of 4 and 8 bits */
  uint16_t* bucket_scale;          /* bf16; of others */
  uint8_t* indices;                /* 16 bits each; packed: 12 bits */
  uint8_t* values;                 /* bf16; packed: int8 */
  uint16_t* scales;                /* bf16; null: the window is not packed */
  float *exp_avg, *exp_avg_sq;
  int64_t param_dtype, grad_dtype; /* enum microadam_dtype */
  int64_t is_stochastic;           /* how bf16 weights are rounded */
} microadam_tensor;

/* The settings of the group that decide shapes. */
typedef struct {
  int64_t window_size, bucket_size, packed_window;
  int64_t levels; /* the largest error-feedback code: 255, 15, 3, 2 (five codes in a byte) or 1; 0: there are none */
} microadam_settings;

MICROADAM_API int microadam_cpu_abi_version(void);

/* Whether this build has code for the instruction set and this machine runs it. */
MICROADAM_API int microadam_cpu_has_isa(int isa);

/* "openmp" when the threads are those of the OpenMP runtime found in the process, else "std::thread". */
MICROADAM_API const char* microadam_cpu_threading(void);

/* Updates the tensors in place with up to `num_threads` threads.
 *
 * Returns the number of skipped blocks (non-finite accumulator; a dense run counts once), or -1 when memory for
 * the scratch buffers is short; nothing has been changed then.
 */
MICROADAM_API int64_t microadam_cpu_step(const microadam_settings* settings, const microadam_tensor* tensors,
                                         int64_t num_tensors, int isa, int num_threads);

#ifdef __cplusplus
}
#endif

#endif
