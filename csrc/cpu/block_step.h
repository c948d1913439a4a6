// The kernel of one instruction set, written in the names of the simd_*.h header included before.
#pragma once

#include "dense.h"
#include "error_feedback.h"
#include "kernel.h"
#include "packed_window.h"
#include "topk.h"
#include "window.h"

namespace microadam {
namespace {

// Calls f with `array` as a pointer to what a microadam_dtype names.
template <class F>
inline void with_type(void* array, int64_t dtype, const F& f) {
  if (dtype == MICROADAM_FP32) {
    f(static_cast<float*>(array));
  } else if (dtype == MICROADAM_BF16) {
    f(static_cast<Bf16*>(array));
  } else {
    f(static_cast<Fp16*>(array));
  }
}

// Top-K of gradient and error: the newest slot, and what is left as the new error. Returns false where the accumulator
// is not finite.
bool keep_largest(const Block& block, const Step& step, const Scratch& s) {
  with_type(const_cast<void*>(block.grad), step.grad_dtype,
            [&](const auto* grad) { accumulate(grad, block, step, s); });
  const bool finite = largest_magnitudes(block, step, s);
  if (!finite) empty_slot(block, s);
  if (block.scales != nullptr) {
    pack_slot(block, step, s);
  } else {
    if (block.indices != nullptr) store_slot(block, step, s);
    clear_kept(block, s);
  }
  if (finite) encode_error(block, step, s);
  return finite;
}

// One MicroAdam step on a block: one pass over its memory, the phases in the order of the algorithm.
bool block_step(const Block& block, const Step& step, const Scratch& s) {
  bool finite = true;
  if (block.grad != nullptr) {
    finite = keep_largest(block, step, s);
  } else if (block.scales == nullptr) {
    load_slot(block, step, s);
  }
  if (finite) with_type(block.param, step.param_dtype, [&](auto* param) { update_weights(param, block, step, s); });
  return finite;
}

bool dense_step(const DensePiece& piece, const Step& step) {
  bool finite = true;
  with_type(piece.param, step.param_dtype, [&](auto* param) {
    with_type(const_cast<void*>(piece.grad), step.grad_dtype,
              [&](const auto* grad) { finite = adamw_step(param, grad, piece, *step.scalars); });
  });
  return finite;
}

}  // namespace
}  // namespace microadam
