// The window: sums over its slots, oldest to newest, and the update they give.
//
// The sums of one section lie in shared memory. Indices are unique inside a slot, so its elements can be added by as
// many threads; a barrier separates the slots. An element that no slot holds keeps the sum M = 0, which gives the
// update 0, so nothing else marks it.
#pragma once

#include "block.cuh"
#include "topk.cuh"

namespace microadam {

__device__ __forceinline__ bool is_staged(int num_kept) {
  return kWindowSize > 1 && kWindowSize * num_kept <= kStageCapacity;
}

// Brings the whole window to shared memory with all loads at once, if it fits.
template <class Param, class Grad>
__device__ __forceinline__ void stage_window(const Block<Param, Grad>& block, Shared& s) {
  if (!is_staged(block.num_kept)) return;
  for (int i = threadIdx.x; i < kWindowSize * block.num_kept; i += kThreads) {
    s.staged[i] = block.indices[i] | static_cast<uint32>(block.values[i].bits) << 16;
  }
}

template <class Param, class Grad>
__device__ __forceinline__ int window_index(const Block<Param, Grad>& block, int i, const Shared& s) {
  return is_staged(block.num_kept) ? s.staged[i] & 0xffffu : block.indices[i];
}

template <class Param, class Grad>
__device__ __forceinline__ float window_value(const Block<Param, Grad>& block, int i, const Shared& s) {
  return is_staged(block.num_kept) ? as_float(s.staged[i] & 0xffff0000u) : to_float(block.values[i]);
}

__device__ __forceinline__ void clear_sums(Shared& s) {
  const float zeros[kVector] = {};
  store_vector(s.m_sums + threadIdx.x * kVector, zeros);
  if (kWindowSize > 1) store_vector(s.v_sums + threadIdx.x * kVector, zeros);
}

// M = sum b1^r V_r,  V = sum b2^r V_r^2 over the slots before the newest. Only as many warps as a slot keeps busy take
// part; the others go on.
template <class Param, class Grad>
__device__ __forceinline__ void sum_old_slots(const Block<Param, Grad>& block, int section, const Launch& launch,
                                              const Scalars& scalars, Shared& s) {
  const int num_threads = min((block.num_kept + 31) / 32 * 32, kThreads);
  if (static_cast<int>(threadIdx.x) >= num_threads) return;
  for (int age = scalars.num_weights - 1; age > 0; --age) {
    const int slot = scalars.newest_slot - age + (scalars.newest_slot < age ? kWindowSize : 0);
    const float m_weight = launch.m_weights[age], v_weight = launch.v_weights[age];
    for (int i = threadIdx.x; i < block.num_kept; i += num_threads) {
      const int entry = slot * block.num_kept + i;
      const uint32 place = window_index(block, entry, s) - section * kSection;
      if (place >= kSection) continue;
      const float value = window_value(block, entry, s);
      s.m_sums[place] = s.m_sums[place] + m_weight * value;
      s.v_sums[place] = s.v_sums[place] + v_weight * (value * value);
    }
    sync_first_threads(num_threads);
  }
}

// Stores the kept elements of chunk c in the newest slot, adds them to the sums and clears them: a[I] = 0.
template <class Param, class Grad>
__device__ __forceinline__ void store_kept(const Block<Param, Grad>& block, int c, float (&a)[kVector],
                                           const Kept& kept, const Scalars& scalars, Shared& s) {
  const int slot = scalars.newest_slot * block.num_kept;
  int position = kept.position;
  if (kept.mask != 0) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if ((kept.mask >> j & 1u) == 0) continue;
      const int place = threadIdx.x * kVector + j;
      const Bf16 rounded{bf16_bits(a[j])};
      const float value = to_float(rounded);
      s.newest[position - kept.section] = static_cast<uint16>(place);
      if (kWindowSize > 1) {
        block.indices[slot + position] = static_cast<uint16>(c * kSection + place);
        block.values[slot + position] = rounded;
        s.m_sums[place] = s.m_sums[place] + value;  // its weight is 1
        s.v_sums[place] = s.v_sums[place] + value * value;
      } else {
        s.m_sums[place] = value;
      }
      a[j] = 0.f;
      ++position;
    }
  }
  if (threadIdx.x == kThreads - 1) s.section_kept = position - kept.section;
}

// The slot of a skipped block is stored empty: zeros at the first places, which add nothing anywhere.
template <class Param, class Grad>
__device__ __forceinline__ void store_empty_slot(const Block<Param, Grad>& block, const Scalars& scalars) {
  if (kWindowSize == 1) return;
  const int slot = scalars.newest_slot * block.num_kept;
  for (int i = threadIdx.x; i < block.num_kept; i += kThreads) {
    block.indices[slot + i] = static_cast<uint16>(i);
    block.values[slot + i].bits = 0;
  }
}

// lr * (m / (eps + sqrt(v)))
__device__ __forceinline__ float adam_update(float m, float v, const Scalars& scalars) {
  return __fdiv_rn(m, __fsqrt_rn(v) + scalars.eps) * scalars.lr;
}

// Replaces M by the update, once for every element, whichever slots hold it: the thread that takes V does it.
__device__ __forceinline__ void update_at(int place, const Scalars& scalars, Shared& s) {
  const float m = s.m_sums[place];
  const float v = kWindowSize > 1 ? atomicExch(&s.v_sums[place], -1.f) : m * m;
  if (v < 0.f) return;
  s.m_sums[place] = adam_update(m * scalars.m_factor, v * scalars.v_factor, scalars);
}

// Square roots and divisions on the elements of a section that the window holds, and on no others.
template <class Param, class Grad>
__device__ __forceinline__ void compute_updates(const Block<Param, Grad>& block, int section, const Scalars& scalars,
                                                Shared& s) {
  for (int i = threadIdx.x; i < s.section_kept; i += kThreads) update_at(s.newest[i], scalars, s);
  if (kWindowSize == 1) return;
  const int newest = scalars.newest_slot * block.num_kept;
  for (int i = threadIdx.x; i < scalars.num_weights * block.num_kept; i += kThreads) {
    if (i >= newest && i < newest + block.num_kept) continue;
    const uint32 place = window_index(block, i, s) - section * kSection;
    if (place < kSection) update_at(place, scalars, s);
  }
}

// p = p * (1 - lr*wd);  p[touched] -= update
template <bool kAligned, class Param, class Grad>
__device__ __forceinline__ void apply_updates(const Block<Param, Grad>& block, int c, const Scalars& scalars,
                                              const Shared& s) {
  const int first = first_element(c), count = block.numel - first;
  if (count <= 0) return;
  float update[kVector], weights[kVector];
  load_vector(update, s.m_sums + threadIdx.x * kVector);
  bool changes = scalars.decay != 1.f || block.param_copy != nullptr;
#pragma unroll
  for (int j = 0; j < kVector; ++j) changes |= update[j] != 0.f;
  if (!changes) return;
  load_first<kAligned>(weights, block.param + first, count);
#pragma unroll
  for (int j = 0; j < kVector; ++j) weights[j] = weights[j] * scalars.decay - update[j];
  store_first<kAligned>(block.param + first, weights, count);
  if (block.param_copy != nullptr) {
    // The copy is rounded from what is stored, not from what was computed.
    load_first<kAligned>(weights, block.param + first, count);
    store_first<kAligned>(block.param_copy + first, weights, count);
  }
}

}  // namespace microadam
