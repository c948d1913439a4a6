// Moments from the window, and the update of the weights.
//
//   M = sum b1^r V_r,  V = sum b2^r V_r^2, oldest to newest, at the touched coordinates
//   p = p * (1 - lr*wd);  p[touched] -= lr * (m / (eps + sqrt(v)))
#pragma once

#include "kernel.h"
#include "vector_loops.h"

namespace microadam {
namespace {

// Coordinates to which the sums of `Scratch` belong.
struct Entries {
  const uint16_t* indices;
  int count;
};

inline int64_t slot_of_age(const Step& step, int64_t age) {
  const int64_t slot = step.scalars->newest_slot - age;
  return slot < 0 ? slot + step.window_size : slot;
}

// Copies the newest slot into the window.
inline void store_slot(const Block& block, const Step& step, const Scratch& s) {
  if (block.indices == nullptr) return;
  const int64_t start = step.scalars->newest_slot * block.num_kept;
  const size_t nbytes = static_cast<size_t>(block.num_kept) * sizeof(uint16_t);
  memcpy(block.indices + start, s.indices, nbytes);
  memcpy(block.values + start, s.values, nbytes);
}

// Copies the newest slot out of the window.
inline void load_slot(const Block& block, const Step& step, const Scratch& s) {
  const int64_t start = step.scalars->newest_slot * block.num_kept;
  const size_t nbytes = static_cast<size_t>(block.num_kept) * sizeof(uint16_t);
  memcpy(s.indices, block.indices + start, nbytes);
  memcpy(s.values, block.values + start, nbytes);
}

// What a skipped block stores: zeros at the first k places.
inline void empty_slot(const Block& block, const Scratch& s) {
  for (int i = 0; i < block.num_kept; ++i) s.indices[i] = static_cast<uint16_t>(i);
  memset(s.values, 0, static_cast<size_t>(block.num_kept) * sizeof(uint16_t));
}

// The window of the block that follows is needed soon.
inline void prefetch_next_window(const Block& block, const Step& step) {
  const int64_t nbytes = step.window_size * block.num_kept * 2;
  for (int64_t i = 0; i < nbytes; i += kCacheLine) {
    prefetch(following(block.indices, nbytes + i));
    prefetch(following(block.values, nbytes + i));
  }
}

// b1^r V_r and b2^r V_r^2 of `count` entries, rounded up to a whole vector. `readable` entries may be read.
inline void weigh(const Bf16* values, int count, int64_t readable, float m_weight, float v_weight, Moments* terms) {
  for (int i = 0; i < count; i += kLanes) {
    const Floats value = readable - i >= kLanes ? load(values + i) : load_first(values + i, count - i);
    // Sums begin with 0: adding it makes a weighted -0 a 0.
    const Floats m = splat(0.f) + value * splat(m_weight), v = splat(0.f) + (value * value) * splat(v_weight);
    store_pairs(reinterpret_cast<float*>(terms + i), m, v);
  }
}

// b1^r V_r and b2^r V_r^2 of the slot of age r, to the terms. Returns the slot's indices.
inline const uint16_t* weigh_slot(const Block& block, const Step& step, int64_t age, const Scratch& s) {
  const microadam_scalars& scalars = *step.scalars;
  const int64_t start = slot_of_age(step, age) * block.num_kept;
  const int64_t readable = scalars.num_weights * block.num_kept - start;
  weigh(block.values + start, block.num_kept, readable, scalars.m_weights[age], scalars.v_weights[age], s.terms);
  return block.indices + start;
}

// M and V at the entries of a window of two valid slots or more. A coordinate that comes several times has its sums at
// its last entry and zeros, which change no weight, at the others; going backwards leaves zeros for the next block too.
inline Entries sum_window(const Block& block, const Step& step, const Scratch& s) {
  Moments *moments = s.moments, *sums = s.sums;
  const Moments* terms = s.terms;
  prefetch_next_window(block, step);
  for (int64_t age = step.scalars->num_weights - 1; age >= 0; --age) {
    const uint16_t* indices = weigh_slot(block, step, age, s);
    MICROADAM_UNROLL
    for (int i = 0; i < block.num_kept; ++i) moments[indices[i]] += terms[i];
  }
  // The valid slots lie one after the other, from the beginning.
  const Entries entries = {block.indices, static_cast<int>(step.scalars->num_weights * block.num_kept)};
  MICROADAM_UNROLL
  for (int i = entries.count - 1; i >= 0; --i) {
    sums[i] = moments[entries.indices[i]];
    moments[entries.indices[i]] = Moments{0.f, 0.f};
  }
  return entries;
}

// The same when the newest slot is all there is.
inline Entries weigh_newest(const Block& block, const Step& step, const Scratch& s) {
  const int count = block.num_kept;
  weigh(s.values, count, count + kPad, step.scalars->m_weights[0], step.scalars->v_weights[0], s.sums);
  return {s.indices, count};
}

// Of all valid slots, however many.
inline Entries sum_entries(const Block& block, const Step& step, const Scratch& s) {
  return step.scalars->num_weights == 1 ? weigh_newest(block, step, s) : sum_window(block, step, s);
}

// lr * (m / (eps + sqrt(v))) of a vector of sums.
inline Floats adam_update(const Moments* sums, const microadam_scalars& scalars) {
  Floats m, v;
  load_pairs(reinterpret_cast<const float*>(sums), &m, &v);
  const Floats denominator = square_root(v * splat(scalars.v_factor)) + splat(scalars.eps);
  return m * splat(scalars.m_factor) / denominator * splat(scalars.lr);
}

// p = p * (1 - lr*wd);  p[touched] -= lr * (m / (eps + sqrt(v)))
inline void update_weights(float* param, const Block& block, const Step& step, const Scratch& s) {
  const microadam_scalars& scalars = *step.scalars;
  const auto [indices, count] = sum_entries(block, step, s);
  if (scalars.decay != 1.f) {
    const Floats decay = splat(scalars.decay);
    transform(param, param, block.numel, [=](Floats w) { return w * decay; });
  }
  float* updates = reinterpret_cast<float*>(s.sums);  // each takes the place of half a sum that has been used
  for (int i = 0; i < count; i += kLanes) store(updates + i, adam_update(s.sums + i, scalars));
  MICROADAM_UNROLL
  for (int i = 0; i < count; ++i) param[indices[i]] -= updates[i];
}

// Whether a weight times `decay` rounds to the weight itself, whatever the weight: with b significant bits its
// neighbours are at least 2**-b times itself away, so a change of 2**-(b+2) times itself is far from half way to them.
inline bool rounds_away(const Bf16*, float decay) { return decay <= 1.f && 1.f - decay <= 0x1p-10f; }
inline bool rounds_away(const Fp16*, float decay) { return decay <= 1.f && 1.f - decay <= 0x1p-13f; }

// The same for 16-bit weights, each rounded once: the touched ones are taken out before the others are decayed.
template <class Param>
inline void update_weights(Param* param, const Block& block, const Step& step, const Scratch& s) {
  const microadam_scalars& scalars = *step.scalars;
  const auto [indices, count] = sum_entries(block, step, s);
  const Floats decay = splat(scalars.decay);
  Param* weights = reinterpret_cast<Param*>(s.weights);
  MICROADAM_UNROLL
  for (int i = 0; i < count; ++i) weights[i] = param[indices[i]];
  if (!rounds_away(param, scalars.decay)) {
    transform(param, param, block.numel, [=](Floats w) { return w * decay; });
  }
  for (int i = 0; i < count; i += kLanes) {
    store(weights + i, load(weights + i) * decay - adam_update(s.sums + i, scalars));
  }
  // In this order: the last entry of a coordinate, which has its sums, is the one that stays.
  MICROADAM_UNROLL
  for (int i = 0; i < count; ++i) param[indices[i]] = weights[i];
}

}  // namespace
}  // namespace microadam
