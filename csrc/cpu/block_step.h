// The kernel of one instruction set, written in the names of the simd_*.h header included before.
#pragma once

#include "dense.h"
#include "error_feedback.h"
#include "kernel.h"
#include "topk.h"
#include "window.h"

namespace microadam {
namespace {

// Calls f with a null pointer to the type that a microadam_dtype names.
template <class F>
inline void with_type(int32_t dtype, const F& f) {
  if (dtype == MICROADAM_FP32) {
    f(static_cast<float*>(nullptr));
  } else if (dtype == MICROADAM_BF16) {
    f(static_cast<Bf16*>(nullptr));
  } else {
    f(static_cast<Fp16*>(nullptr));
  }
}

template <class T>
T element_of(T*);

// One MicroAdam step on a block: one pass over its memory, the phases in the order of the algorithm.
bool block_step(const Block& block, const Step& step, const Scratch& s) {
  with_type(step.grad_dtype, [&](auto* type) { accumulate<decltype(element_of(type))>(block, step, s); });
  const bool finite = largest_magnitudes(block, step, s);
  if (finite) {
    for (int i = 0; i < block.num_kept; ++i) s.accumulator[s.indices[i]] = 0.f;
    encode_error(block, step, s);
  } else {
    empty_slot(block, s);
  }
  store_slot(block, step, s);
  with_type(step.param_dtype, [&](auto* type) {
    auto* param = static_cast<decltype(type)>(block.param);
    if (finite) update_weights(param, block, step, s);
    if (block.param_copy != nullptr) convert(block.param_copy, param, block.numel);
  });
  return finite;
}

bool dense_step(const DensePiece& piece, const Step& step) {
  bool finite = true;
  with_type(step.param_dtype, [&](auto* param) {
    with_type(step.grad_dtype, [&](auto* grad) {
      finite = adamw_step<decltype(element_of(param)), decltype(element_of(grad))>(piece, *step.scalars);
    });
  });
  return finite;
}

}  // namespace
}  // namespace microadam
