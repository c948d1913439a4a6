// Moments from the window, and the update of the weights.
//
//   M = sum b1^r V_r,  V = sum b2^r V_r^2, oldest to newest, at the touched coordinates
//   p = p * (1 - lr*wd);  p[touched] -= lr * (m / (eps + sqrt(v)))
#pragma once

#include "kernel.h"
#include "packed_window.h"
#include "rounding.h"
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
  const int64_t slot = step.scalars->newest_slot;
  memcpy(block.indices + slot * block.index_bytes, s.indices, static_cast<size_t>(block.index_bytes));
  memcpy(block.values + slot * block.value_bytes, s.values, static_cast<size_t>(block.value_bytes));
}

// Copies the newest slot out of the window.
inline void load_slot(const Block& block, const Step& step, const Scratch& s) {
  const int64_t slot = step.scalars->newest_slot;
  memcpy(s.indices, block.indices + slot * block.index_bytes, static_cast<size_t>(block.index_bytes));
  memcpy(s.values, block.values + slot * block.value_bytes, static_cast<size_t>(block.value_bytes));
}

// What a skipped block stores: zeros at the first k places.
inline void empty_slot(const Block& block, const Scratch& s) {
  for (int i = 0; i < block.num_kept; ++i) s.indices[i] = static_cast<uint16_t>(i);
  memset(s.values, 0, static_cast<size_t>(block.num_kept) * sizeof(uint16_t));
}

// The window of the block that follows is needed soon.
inline void prefetch_next_window(const Block& block, const Step& step) {
  const int64_t index_bytes = step.window_size * block.index_bytes, value_bytes = step.window_size * block.value_bytes;
  for (int64_t i = 0; i < index_bytes; i += kCacheLine) prefetch(following(block.indices, index_bytes + i));
  for (int64_t i = 0; i < value_bytes; i += kCacheLine) prefetch(following(block.values, value_bytes + i));
}

// b1^r V_r and b2^r V_r^2 of `count` entries, rounded up to a whole vector. `readable` entries may be read.
template <class Value>
inline void weigh(const Value* values, int count, int64_t readable, float m_weight, float v_weight, Moments* terms) {
  for (int i = 0; i < count; i += kLanes) {
    const Floats value = readable - i >= kLanes ? load(values + i) : load_first(values + i, count - i);
    // Sums begin with 0: adding it makes a weighted -0 a 0.
    const Floats m = splat(0.f) + value * splat(m_weight), v = splat(0.f) + (value * value) * splat(v_weight);
    store_pairs(reinterpret_cast<float*>(terms + i), m, v);
  }
}

// b1^r V_r and b2^r V_r^2 of the slot of age r, to the terms.
inline void weigh_slot(const Block& block, const Step& step, int64_t age, const Scratch& s) {
  const microadam_scalars& scalars = *step.scalars;
  const float m_weight = scalars.m_weights[age], v_weight = scalars.v_weights[age];
  const int64_t slot = slot_of_age(step, age);
  const int count = block.num_kept;
  if (block.scales != nullptr) {
    unpack_values(block, slot, s.unpacked_values);
    weigh(s.unpacked_values, count, count + kPad, m_weight, v_weight, s.terms);
  } else {
    const Bf16* values = reinterpret_cast<const Bf16*>(block.values) + slot * count;
    weigh(values, count, (scalars.num_weights - slot) * count, m_weight, v_weight, s.terms);
  }
}

// Of all valid slots, which lie one after the other, from the beginning.
inline Entries window_entries(const Block& block, const Step& step, const Scratch& s) {
  const int num_slots = static_cast<int>(step.scalars->num_weights), count = num_slots * block.num_kept;
  if (block.scales == nullptr) return {reinterpret_cast<const uint16_t*>(block.indices), count};
  for (int slot = 0; slot < num_slots; ++slot) unpack_indices(block, slot, s.unpacked_indices + slot * block.num_kept);
  return {s.unpacked_indices, count};
}

// M and V at the entries of the window. A coordinate that comes several times has its sums at its last entry and zeros,
// which change no weight, at the others; going backwards leaves zeros for the next block too.
inline Entries sum_window(const Block& block, const Step& step, const Scratch& s) {
  Moments *moments = s.moments, *sums = s.sums;
  const Moments* terms = s.terms;
  prefetch_next_window(block, step);
  const Entries entries = window_entries(block, step, s);
  for (int64_t age = step.scalars->num_weights - 1; age >= 0; --age) {
    weigh_slot(block, step, age, s);
    const uint16_t* indices = entries.indices + slot_of_age(step, age) * block.num_kept;
    MICROADAM_UNROLL
    for (int i = 0; i < block.num_kept; ++i) moments[indices[i]] += terms[i];
  }
  MICROADAM_UNROLL
  for (int i = entries.count - 1; i >= 0; --i) {
    sums[i] = moments[entries.indices[i]];
    moments[entries.indices[i]] = Moments{0.f, 0.f};
  }
  return entries;
}

// The same when the newest slot, which is not packed, is all there is.
inline Entries weigh_newest(const Block& block, const Step& step, const Scratch& s) {
  const int count = block.num_kept;
  weigh(s.values, count, count + kPad, step.scalars->m_weights[0], step.scalars->v_weights[0], s.sums);
  return {s.indices, count};
}

// Of all valid slots, however many.
inline Entries sum_entries(const Block& block, const Step& step, const Scratch& s) {
  const bool is_newest_enough = step.scalars->num_weights == 1 && block.scales == nullptr;
  return is_newest_enough ? weigh_newest(block, step, s) : sum_window(block, step, s);
}

// lr * (m / (eps + sqrt(v))) of a vector of sums.
inline Floats adam_update(const Moments* sums, const microadam_scalars& scalars) {
  Floats m, v;
  load_pairs(reinterpret_cast<const float*>(sums), &m, &v);
  const Floats denominator = square_root(v * splat(scalars.v_factor)) + splat(scalars.eps);
  return m * splat(scalars.m_factor) / denominator * splat(scalars.lr);
}

// p = p * (1 - lr*wd);  p[touched] -= lr * (m / (eps + sqrt(v)))
inline void update_weights(float* param, const Nearest& rounding, const Block& block, const Step& step,
                           const Scratch& s) {
  const microadam_scalars& scalars = *step.scalars;
  const auto [indices, count] = sum_entries(block, step, s);
  rounding.decay(param, block.numel, scalars.decay);
  float* updates = reinterpret_cast<float*>(s.sums);  // each takes the place of half a sum that has been used
  for (int i = 0; i < count; i += kLanes) store(updates + i, adam_update(s.sums + i, scalars));
  MICROADAM_UNROLL
  for (int i = 0; i < count; ++i) param[indices[i]] -= updates[i];
}

// The same for 16-bit weights, each rounded once: the touched ones are taken out before the others are decayed.
template <class Param, class Rounding>
inline void update_weights(Param* param, const Rounding& rounding, const Block& block, const Step& step,
                           const Scratch& s) {
  const microadam_scalars& scalars = *step.scalars;
  const auto [indices, count] = sum_entries(block, step, s);
  const Floats decay = splat(scalars.decay);
  Param* weights = reinterpret_cast<Param*>(s.weights);
  MICROADAM_UNROLL
  for (int i = 0; i < count; ++i) weights[i] = param[indices[i]];
  rounding.decay(param, block.numel, scalars.decay);
  for (int i = 0; i < count; i += kLanes) {
    const Floats weight = load(weights + i) * decay - adam_update(s.sums + i, scalars);
    rounding.store_listed(indices + i, count - i, weights + i, weight);
  }
  // In this order: the last entry of a coordinate, which has its sums, is the one that stays.
  MICROADAM_UNROLL
  for (int i = 0; i < count; ++i) param[indices[i]] = weights[i];
}

}  // namespace
}  // namespace microadam
