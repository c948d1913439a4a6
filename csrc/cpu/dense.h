// The dense path: AdamW, elementwise, with fp32 moments.
#pragma once

#include "kernel.h"
#include "rounding.h"
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

template <class Param, class Rounding, class Grad>
inline uint32_t adamw_at(int i, const microadam_scalars& scalars, Param* param, const Rounding& rounding,
                         const Grad* grad, float* exp_avg, float* exp_avg_sq) {
  Floats p = load(param + i), m = load(exp_avg + i), v = load(exp_avg_sq + i);
  const uint32_t skipped = adamw(scalars, load(grad + i), &p, &m, &v);
  rounding.store_from(i, param + i, p);
  store(exp_avg + i, m);
  store(exp_avg_sq + i, v);
  return skipped;
}

// Returns false when an element was skipped.
template <class Param, class Rounding, class Grad>
inline bool adamw_step(Param* param, const Rounding& rounding, const Grad* grad, const DensePiece& piece,
                       const microadam_scalars& scalars) {
  float *exp_avg = piece.exp_avg, *exp_avg_sq = piece.exp_avg_sq;
  uint32_t skipped = 0;
  int i = 0;
  for (; i + kLanes <= piece.numel; i += kLanes) {
    skipped |= adamw_at(i, scalars, param, rounding, grad, exp_avg, exp_avg_sq);
  }
  const int rest = piece.numel - i;
  if (rest > 0) {
    Floats p = load_first(param + i, rest), m = load_first(exp_avg + i, rest), v = load_first(exp_avg_sq + i, rest);
    skipped |= adamw(scalars, load_first(grad + i, rest), &p, &m, &v);
    Param padded[kLanes];
    rounding.store_from(i, padded, p);
    memcpy(param + i, padded, static_cast<size_t>(rest) * sizeof(Param));
    store_first(exp_avg + i, rest, m);
    store_first(exp_avg_sq + i, rest, v);
  }
  return skipped == 0;
}

}  // namespace
}  // namespace microadam
