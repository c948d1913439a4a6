// The dense path: AdamW, elementwise, with fp32 moments.
#pragma once

#include "kernel.h"
#include "topk.h"
#include "vector_loops.h"

namespace microadam {
namespace {

// m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  p = p * (1 - lr*wd) - lr * (m_hat / (eps + sqrt(v_hat)))
// on one vector. Returns the lanes that were skipped, one bit each.
inline uint32_t adamw(const microadam_scalars& scalars, Floats grad, Floats* param, Floats* exp_avg,
                      Floats* exp_avg_sq) {
  const Floats g = grad * splat(scalars.grad_scale);
  const Lanes finite = less(magnitude(g), splat(kNotFinite));
  const Floats m = *exp_avg * splat(scalars.beta1) + g * splat(scalars.one_minus_beta1);
  const Floats v = *exp_avg_sq * splat(scalars.beta2) + (g * g) * splat(scalars.one_minus_beta2);
  const Floats m_hat = m * splat(scalars.m_correction), v_hat = v * splat(scalars.v_correction);
  const Floats update = m_hat / (square_root(v_hat) + splat(scalars.eps)) * splat(scalars.lr);
  *param = choose(finite, *param * splat(scalars.decay) - update, *param);
  *exp_avg = choose(finite, m, *exp_avg);
  *exp_avg_sq = choose(finite, v, *exp_avg_sq);
  return ~lane_bits(finite) & ((1u << kLanes) - 1u);
}

template <class Param, class Grad>
inline uint32_t adamw_at(const microadam_scalars& scalars, Param* param, const Grad* grad, float* exp_avg,
                         float* exp_avg_sq) {
  Floats p = load(param), m = load(exp_avg), v = load(exp_avg_sq);
  const uint32_t skipped = adamw(scalars, load(grad), &p, &m, &v);
  store(param, p);
  store(exp_avg, m);
  store(exp_avg_sq, v);
  return skipped;
}

// Returns false when an element was skipped.
template <class Param, class Grad>
inline bool adamw_step(Param* param, const Grad* grad, const DensePiece& piece, const microadam_scalars& scalars) {
  float *exp_avg = piece.exp_avg, *exp_avg_sq = piece.exp_avg_sq;
  uint32_t skipped = 0;
  int i = 0;
  for (; i + kLanes <= piece.numel; i += kLanes) {
    skipped |= adamw_at(scalars, param + i, grad + i, exp_avg + i, exp_avg_sq + i);
  }
  const int rest = piece.numel - i;
  if (rest > 0) {
    Floats p = load_first(param + i, rest), m = load_first(exp_avg + i, rest), v = load_first(exp_avg_sq + i, rest);
    skipped |= adamw(scalars, load_first(grad + i, rest), &p, &m, &v);
    store_first(param + i, rest, p);
    store_first(exp_avg + i, rest, m);
    store_first(exp_avg_sq + i, rest, v);
  }
  return skipped == 0;
}

}  // namespace
}  // namespace microadam
