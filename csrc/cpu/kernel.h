// What the instruction-set files offer to the rest: one step on one Top-K block, and on a piece of the dense path.
#pragma once

#include <stdint.h>

#include "floats.h"
#include "microadam_cpu.h"

namespace microadam {

constexpr int kTile = 64;        // elements that the phases work on at a time
constexpr int kGroup = 4;        // elements whose common largest magnitude is kept for the selection
constexpr int kPad = 2 * kTile;  // elements that vector code may touch beyond the end of a scratch buffer

// One Top-K block.
struct Block {
  void* param;
  const void* grad;  // null: the newest slot is in the window already, only the weights are updated
  uint8_t* codes;
  Bf16 *bucket_lo, *bucket_hi;  // null where codes have fewer than 4 bits ...
  Bf16* bucket_scale;           // ... and this where they have more
  // window_size slots of num_kept entries, see window.h; null: no window is stored
  uint8_t *indices, *values;
  Bf16* scales;  // one for each slot; null: the window is not packed
  int numel, num_kept;
  int index_bytes, value_bytes;  // of a slot
  uint32_t counter;              // of the first element, see rounding.h
};

// A piece of the dense path.
struct DensePiece {
  void* param;
  const void* grad;
  float *exp_avg, *exp_avg_sq;
  int numel;
  uint32_t counter;  // of the first element, see rounding.h
};

// What all blocks of a tensor share.
struct Step {
  const microadam_scalars* scalars;
  int64_t window_size, bucket_size;
  int64_t param_dtype, grad_dtype;
  bool is_stochastic;
  int levels;  // see microadam_settings
};

namespace {  // see floats.h
inline int64_t element_bytes(int64_t dtype) { return dtype == MICROADAM_FP32 ? 4 : 2; }
}  // namespace

// First and second moment of one coordinate.
typedef float Moments __attribute__((vector_size(8), may_alias));

// Buffers of one thread, each with kPad more elements than said.
struct Scratch {
  float* accumulator;    // (numel) accumulator, then residual
  Moments* moments;      // (numel) window sums by coordinate; all zero between blocks
  uint16_t* indices;     // (num_kept) the newest slot
  Bf16* values;          // (num_kept)
  uint32_t* last_key;    // (1) where to start the search for the threshold; no influence on the result
  float* bucket_lo;      // (num_buckets)
  float* bucket_factor;  // (num_buckets) step when decoding, its inverse when encoding
  uint8_t* codes;        // (numel) where they have not 4 bits

  // selection
  uint32_t* maxima;          // (numel / kGroup) largest magnitude of each group
  uint16_t* candidates;      // (numel) positions that may belong to the k largest, ascending
  uint32_t* candidate_bits;  // (numel) and the accumulator there

  // update of the weights; may overlap with what the selection needs
  Moments* terms;              // (num_kept) what one slot adds to the window sums
  Moments* sums;               // (entries) window sums of the entries in the window
  uint16_t* weights;           // (entries) and the weights there, if they have 16 bits
  uint16_t* unpacked_indices;  // (entries) of a packed window
  float* unpacked_values;      // (num_kept) of one of its slots
};

struct Kernel {
  // One step on a block. Returns false when its accumulator is not finite and it was skipped.
  bool (*block_step)(const Block&, const Step&, const Scratch&);
  // One AdamW step. Returns false when an element was skipped.
  bool (*dense_step)(const DensePiece&, const Step&);
};

extern const Kernel kPortableKernel, kAvx2Kernel, kAvx512Kernel;

}  // namespace microadam
