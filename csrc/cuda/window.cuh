// The window: sums over its slots, oldest to newest, and the update they give.
//
// The sums of one section lie in shared memory. Indices are unique inside a slot, so its elements can be added by as
// many threads; a barrier separates the slots. An element that no slot holds keeps the sum M = 0, which gives the
// update 0, so nothing else marks it.
#pragma once

#include "slot.cuh"
#include "topk.cuh"

namespace microadam {

template <class Traits>
__device__ __forceinline__ bool is_staged(int num_kept) {
  return Traits::kHasWindow && Traits::kWindowSize * num_kept <= Traits::kStageCapacity;
}

// Brings the whole window to shared memory with all loads at once, if it fits.
template <class Traits>
__device__ __forceinline__ void stage_window(Shared<Traits>& s) {
  if (!is_staged<Traits>(s.block.num_kept)) return;
#pragma unroll 1
  for (int i = threadIdx.x; i < Traits::kWindowSize * s.block.num_kept; i += Traits::kThreads) {
    s.staged[i] = stored_entry(i, s.block);
  }
}

// Entry number i of the window: its index, and the bits of its value in the upper half.
template <class Traits>
__device__ __forceinline__ uint32 window_entry(int i, const Shared<Traits>& s) {
  return is_staged<Traits>(s.block.num_kept) ? s.staged[i] : stored_entry(i, s.block);
}

template <class Traits>
__device__ __forceinline__ void clear_sums(Shared<Traits>& s) {
  const float zeros[kVector] = {};
  store_vector(s.m_sums + threadIdx.x * kVector, zeros);
  if (Traits::kHasWindow) store_vector(s.v_sums + threadIdx.x * kVector, zeros);
}

// M = sum b1^r V_r,  V = sum b2^r V_r^2 over the slots in the window: those before the newest, or all in a replay. Only
// as many warps as a slot keeps busy take part; the others go on.
template <class Traits>
__device__ __forceinline__ void sum_slots(int section, const Launch& launch, Shared<Traits>& s) {
  const int num_kept = s.block.num_kept, num_threads = min((num_kept + 31) / 32 * 32, Traits::kThreads);
  if (static_cast<int>(threadIdx.x) >= num_threads) return;
#pragma unroll 1
  for (int age = s.scalars.num_weights - 1; age >= (Traits::kReplays ? 0 : 1); --age) {
    const int slot = s.scalars.newest_slot - age + (s.scalars.newest_slot < age ? Traits::kWindowSize : 0);
    const float m_weight = launch.m_weights[age], v_weight = launch.v_weights[age];
    const float scale = Traits::kPackedWindow ? to_float(in_global(s.block.scales)[slot]) : 1.f;
#pragma unroll 1
    for (int i = threadIdx.x; i < num_kept; i += num_threads) {
      const uint32 entry = window_entry(slot * num_kept + i, s), place = (entry & 0xffffu) - section * Traits::kSection;
      if (place >= Traits::kSection) continue;
      const float value = value_of<Traits>(entry, scale);
      s.m_sums[place] = s.m_sums[place] + m_weight * value;
      s.v_sums[place] = s.v_sums[place] + v_weight * (value * value);
    }
    sync_first_threads(num_threads);
  }
}

// lr * (m / (eps + sqrt(v)))
__device__ __forceinline__ float adam_update(float m, float v, const Scalars& scalars) {
  return __fdiv_rn(m, __fsqrt_rn(v) + scalars.eps) * scalars.lr;
}

__device__ __forceinline__ float window_update(float m_sum, float v_sum, const Scalars& scalars) {
  return adam_update(m_sum * scalars.m_factor, v_sum * scalars.v_factor, scalars);
}

constexpr float kTaken = -1.f;  // in the place of V: M has become the update already

// The newest slot: stores it, adds it to the sums, and updates its elements, whose sums are then complete.
template <class Traits>
__device__ __forceinline__ void take_newest(int section, int first, int count, const Scale& scale, Shared<Traits>& s) {
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += Traits::kThreads) {
    const uint32 entry = s.list[i], place = entry & 0xffffu;
    float m = as_float(entry & 0xffff0000u);
    if (Traits::kPackedWindow) m = stored_value(m, scale);
    float v = m * m;  // their weights are 1
    if (Traits::kHasWindow) {
      if (Traits::kPackedWindow) {
        store_packed_entry(section, first, i, count, scale, s);
      } else {
        store_entry(first + i, section * Traits::kSection + place, entry >> 16, s);
      }
      m = s.m_sums[place] + m;
      v = s.v_sums[place] + v;
      s.v_sums[place] = kTaken;
    }
    s.m_sums[place] = window_update(m, v, s.scalars);
  }
}

// The elements these slots hold; of several slots that hold one, the first thread to come updates it.
template <class Traits>
__device__ __forceinline__ void update_slots(int section, Shared<Traits>& s) {
  if (!Traits::kHasWindow) return;
  const int num_kept = s.block.num_kept, newest = s.scalars.newest_slot * num_kept;
#pragma unroll 1
  for (int i = threadIdx.x; i < s.scalars.num_weights * num_kept; i += Traits::kThreads) {
    const uint32 place = (window_entry(i, s) & 0xffffu) - section * Traits::kSection;
    if (place >= Traits::kSection || (!Traits::kReplays && i >= newest && i < newest + num_kept)) continue;
    const float v = atomicExch(&s.v_sums[place], kTaken);
    if (v >= 0.f) s.m_sums[place] = window_update(s.m_sums[place], v, s.scalars);
  }
}

// Lists the kept elements of a section, as many as the list holds at once, and takes them; a[I] = 0, packed: a[I] -= V.
template <class Traits>
__device__ __forceinline__ void take_kept(int section, const uint32 (&packed)[kVector / 2], const Kept& kept,
                                          const Scale& scale, float (&a)[kVector], Shared<Traits>& s) {
  if (threadIdx.x == Traits::kThreads - 1) s.section_kept = kept.position - kept.section + __popc(kept.mask);
  int listed = 0;
  do {
    uint32* next = s.list + (kept.position - kept.section - listed);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if ((kept.mask & 1u << bit_of(j)) == 0) continue;
      if (Traits::kListHoldsSection || (next >= s.list && next < s.list + Traits::kListCapacity)) {
        const uint32 value = j % 2 == 0 ? packed[j / 2] << 16 : packed[j / 2] & 0xffff0000u;
        *next = value | threadIdx.x * kVector | j;
        a[j] = Traits::kPackedWindow ? a[j] - stored_value(as_float(value), scale) : 0.f;
      }
      ++next;
    }
    __syncthreads();
    take_newest(section, kept.section + listed, min(s.section_kept - listed, Traits::kListCapacity), scale, s);
    __syncthreads();
    listed += Traits::kListCapacity;
  } while (!Traits::kListHoldsSection && listed < s.section_kept);
}

// p = p * (1 - lr*wd);  p[touched] -= update
template <bool kAligned, class Traits>
__device__ __forceinline__ void apply_updates(int section, const Shared<Traits>& s) {
  const int first = first_element<Traits>(section), count = s.block.numel - first;
  if (count <= 0) return;
  float update[kVector], weights[kVector];
  load_vector(update, s.m_sums + threadIdx.x * kVector);
  uint32 bits = 0;
#pragma unroll
  for (int j = 0; j < kVector; ++j) bits |= float_bits(update[j]);
  const Ending ending = s.block.ending;
  if (bits == 0 && ending.decay == 1.f) return;
  load_first<kAligned>(weights, in_global(s.block.param) + first, count);
#pragma unroll
  for (int j = 0; j < kVector; ++j) weights[j] = weights[j] * ending.decay - update[j];
  auto* const param = in_global(s.block.param) + first;
  if constexpr (Traits::kStochastic) {
    store_first<kAligned>(param, weights, count, ending.counter + first * kPositionFactor);
  } else {
    store_first<kAligned>(param, weights, count);
  }
}

}  // namespace microadam
