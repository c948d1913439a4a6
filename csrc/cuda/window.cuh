// The window: sums over its slots, oldest to newest, and the update they give.
//
// The sums of one section lie in shared memory. Indices are unique inside a slot, so its elements can be added by as
// many threads; a barrier separates the slots. The newest slot is added by the warps that keep its elements, which then
// go on alone.
#pragma once

#include "slot.cuh"
#include "topk.cuh"

namespace microadam {

// Brings the whole window to shared memory with all loads at once, if it fits.
template <class Traits>
__device__ __forceinline__ void stage_window(Shared<Traits>& s) {
  if constexpr (Traits::kIsStaged) {
#pragma unroll 1
    for (int i = threadIdx.x; i < Traits::kWindowSize * s.block.num_kept(); i += Traits::kThreads) {
      s.staged[i] = stored_entry(i, s.block);
    }
  }
}

// Entry number i of the window: its index, and the bits of its value in the upper half.
template <class Traits>
__device__ __forceinline__ uint32 window_entry(int i, const Shared<Traits>& s) {
  if constexpr (Traits::kIsStaged) return s.staged[i];
  return stored_entry(i, s.block);
}

// No element is in the sums.
template <class Traits>
__device__ __forceinline__ void clear_sums(Shared<Traits>& s) {
  const uint4 zeros = make_uint4(0, 0, 0, 0);
  const int first = threadIdx.x / kWarp * kGroup / 4 + lane_of_thread();
#pragma unroll
  for (int i = 0; i < kVector / 4; ++i) {
    reinterpret_cast<uint4*>(s.update)[first + i * kWarp] = zeros;
    if (Traits::kHasWindow) reinterpret_cast<uint4*>(s.v_sums)[first + i * kWarp] = zeros;
  }
  if (Traits::kHasWindow) s.touched[threadIdx.x] = 0;
}

// M = sum b1^r V_r,  V = sum b2^r V_r^2 over the slots in the window: those before the newest, or all in a replay. For
// threads from `first_thread` on; only as many warps as a slot keeps busy take part.
template <class Traits>
__device__ __forceinline__ void sum_slots(int section, int first_thread, const Launch& launch, Shared<Traits>& s) {
  if constexpr (!Traits::kHasWindow) return;
  const int num_kept = s.block.num_kept(), thread = threadIdx.x - first_thread;
  const int num_threads = min((num_kept + kWarp - 1) / kWarp * kWarp, Traits::kThreads - first_thread);
  if (thread >= num_threads) return;
#pragma unroll 1
  for (int age = s.scalars.num_weights - 1; age >= (Traits::kReplays ? 0 : 1); --age) {
    const int slot = s.scalars.newest_slot - age + (s.scalars.newest_slot < age ? Traits::kWindowSize : 0);
    const float m_weight = launch.m_weights[age], v_weight = launch.v_weights[age];
    const float scale = Traits::kPackedWindow ? to_float(in_global(s.block.scales)[slot]) : 1.f;
#pragma unroll 1
    for (int i = thread; i < num_kept; i += num_threads) {
      const uint32 entry = window_entry(slot * num_kept + i, s), place = (entry & 0xffffu) - section * Traits::kSection;
      if (place >= Traits::kSection) continue;
      const float value = value_of<Traits>(entry, scale);
      s.update[swizzled(place)] += m_weight * value;
      s.v_sums[place] += v_weight * (value * value);
      atomicOr(reinterpret_cast<uint32*>(s.touched) + place / 32, 1u << place % 32);
    }
    sync_threads_beside(num_threads);
  }
}

// The sums of another section than the first, or those of a replay.
template <class Traits>
__device__ __forceinline__ void sum_section(int section, const Launch& launch, Shared<Traits>& s) {
  __syncthreads();
  clear_sums(s);
  __syncthreads();
  sum_slots(section, 0, launch, s);
  if (Traits::kHasWindow) __syncthreads();
}

// lr * (m / (eps + sqrt(v)))
__device__ __forceinline__ float adam_update(float m, float v, const Scalars& scalars) {
  return __fdiv_rn(m, __fsqrt_rn(v) + scalars.eps) * scalars.lr;
}

__device__ __forceinline__ float window_update(float m_sum, float v_sum, const Scalars& scalars) {
  return adam_update(m_sum * scalars.m_factor, v_sum * scalars.v_factor, scalars);
}

// Lists the elements of a mask at `position`.
template <class Traits>
__device__ __forceinline__ void list_elements(int position, uint32 mask, Shared<Traits>& s) {
  uint8* end = group_space(s.places) + position + __popc(mask);
#pragma unroll 1
  for (uint32 rest = mask; rest != 0;) {
    const int j = highest_bit(rest);
    *--end = static_cast<uint8>(lane_of_thread() * kVector + j);
    rest ^= 1u << j;
  }
}

// Where number i of a list is in the group.
template <class Traits>
__device__ __forceinline__ uint32 listed_place(int i, const List& list, const Shared<Traits>& s) {
  return group_space(s.places)[i] + (i < list.in_first_half ? 0u : kGroup / 2u);
}

// Lists the kept elements of a group and takes them: a[I] = 0, packed: a[I] -= V.
template <class Traits>
__device__ __forceinline__ void take_kept(const Kept& kept, const Scale& scale, float (&a)[kVector],
                                          Shared<Traits>& s) {
  if (Traits::kChunks > 1) store_vector(reinterpret_cast<Bf16*>(own_elements(s.keys)), a);
  list_elements(kept.position, kept.mask, s);
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if ((kept.mask & 1u << j) == 0) continue;
    a[j] = Traits::kPackedWindow ? a[j] - stored_value(to_float(Bf16{bf16_bits(a[j])}), scale) : 0.f;
  }
  __syncwarp();
}

// The kept elements of a group are stored as its part of the newest slot and added to the sums.
template <class Traits>
__device__ __forceinline__ void add_newest(int chunk, const Kept& kept, const Scale& scale, Shared<Traits>& s) {
  const uint32 first = group_of<Traits>(chunk) * kGroup;
#pragma unroll 1
  for (int i = lane_of_thread(); i < kept.list.count; i += kWarp) {
    const uint32 place = listed_place(i, kept.list, s), key = group_space(s.keys)[place];
    uint32 next = 0;
    if (Traits::kPackedWindow && i + 1 < kept.list.count) next = first + listed_place(i + 1, kept.list, s);
    store_kept(chunk, kept.before + i, first + place, next, key, i == 0, scale, s);
    float value = as_float(key << 16);
    if (Traits::kPackedWindow) value = stored_value(value, scale);
    group_space(s.update)[swizzled(place)] += value;  // their weights are 1
    group_space(s.v_sums)[place] += value * value;
  }
  __syncwarp();
}

// The updates of a group in the place of the sums.
template <class Traits>
__device__ __forceinline__ void update_group(const Kept& kept, Shared<Traits>& s) {
  const Scalars scalars = s.scalars;
  List list = kept.list;
  if constexpr (Traits::kHasWindow) {
    const uint32 mask = s.touched[threadIdx.x] | kept.mask, count = __popc(mask);
    const int position = sum_up_to_lane(count) - count;
    list_elements(position, mask, s);
    list = make_list(position, mask);
    __syncwarp();
  }
#pragma unroll 1
  for (int i = lane_of_thread(); i < list.count; i += kWarp) {
    const uint32 place = listed_place(i, list, s);
    float* const update = group_space(s.update) + swizzled(place);
    if constexpr (Traits::kHasWindow) {
      *update = window_update(*update, group_space(s.v_sums)[place], scalars);
    } else {
      const float value = as_float(static_cast<uint32>(group_space(s.keys)[place]) << 16);
      *update = window_update(value, value * value, scalars);
    }
  }
  __syncwarp();
}

// The updates of the lane's own elements.
template <class Traits>
__device__ __forceinline__ void load_updates(float (&update)[kVector], const Shared<Traits>& s) {
  const float4* const fours = reinterpret_cast<const float4*>(own_elements(s.update));
  const int turn = swizzled(threadIdx.x * kVector) % kVector / 4;
#pragma unroll
  for (int i = 0; i < kVector; i += 4) {
    const float4 four = fours[i / 4 ^ turn];
    update[i] = four.x;
    update[i + 1] = four.y;
    update[i + 2] = four.z;
    update[i + 3] = four.w;
  }
}

template <class Traits>
__device__ __forceinline__ void copy_weights_ahead(Shared<Traits>& s) {
  if constexpr (Traits::kCopiesAhead) {
    const int first = first_element<Traits>(0);
    if (first < s.block.numel()) copy_ahead(own_elements(s.weights), in_global(s.block.param) + first);
  }
}

// p = p * (1 - lr*wd);  p[touched] -= update
template <class Traits>
__device__ __forceinline__ void apply_updates(int chunk, const Shared<Traits>& s) {
  const int first = first_element<Traits>(chunk), count = s.block.numel() - first;
  if (count <= 0) return;
  float update[kVector], weights[kVector];
  load_updates(update, s);
  const Ending ending = s.block.ending;
  if (ending.decay == 1.f) {
    uint32 bits = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) bits |= float_bits(update[j]);
    if (bits == 0) return;
  }
  auto* const param = in_global(s.block.param) + first;
  if constexpr (Traits::kCopiesAhead) {
    wait_for_copies();
    load_first<true>(weights, own_elements(s.weights), count);
  } else {
    load_first<Traits::kAligned>(weights, param, count);
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j) weights[j] = weights[j] * ending.decay - update[j];
  if constexpr (Traits::kStochastic) {
    store_first<Traits::kAligned>(param, weights, count, ending.counter + first * kPositionFactor);
  } else {
    store_first<Traits::kAligned>(param, weights, count);
  }
}

}  // namespace microadam
