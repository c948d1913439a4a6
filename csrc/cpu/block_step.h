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

// Calls f with the weights and how they are rounded; `counter`: of the first of them.
template <class F>
inline void with_weights(void* param, const Step& step, uint32_t counter, const F& f) {
  if (step.is_stochastic) {
    f(static_cast<Bf16*>(param), Stochastic(counter));
  } else {
    with_type(param, step.param_dtype, [&](auto* weights) { f(weights, Nearest()); });
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
  if (finite && step.levels != 0) encode_error(block, step, s);
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
  if (!finite) return false;
  with_weights(block.param, step, block.counter,
               [&](auto* param, const auto& rounding) { update_weights(param, rounding, block, step, s); });
  return true;
}

bool dense_step(const DensePiece& piece, const Step& step) {
  bool finite = true;
  with_weights(piece.param, step, piece.counter, [&](auto* param, const auto& rounding) {
    with_type(const_cast<void*>(piece.grad), step.grad_dtype,
              [&](const auto* grad) { finite = adamw_step(param, rounding, grad, piece, *step.scalars); });
  });
  return finite;
}

}  // namespace
}  // namespace microadam
