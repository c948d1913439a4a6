// How the entries of a window slot are stored: 16-bit indices and bf16 values, or packed, which is 12-bit indices and
// 8-bit values with a scale for each slot:
//
//   scale = bf16(max|V| / 127);  codes = clip(rint(V * (1 / scale)), -127, 127);  V = codes * scale
#pragma once

#include "block.cuh"

namespace microadam {

constexpr float kMaxCode = 127.f;

// Of the newest slot.
struct Scale {
  float scale, inverse;
};

__device__ __forceinline__ Scale make_scale(uint32 largest_key, Bf16* stored) {
  stored->bits = bf16_bits(__fdiv_rn(as_float(largest_key << 16), kMaxCode));
  Scale scale = {to_float(*stored), 0.f};
  const float inverse = __fdiv_rn(1.f, scale.scale);
  if (float_bits(inverse) < kInfBits) scale.inverse = inverse;
  return scale;
}

// After find_largest and a barrier.
template <class Traits>
__device__ __forceinline__ Scale store_scale(const Shared<Traits>& s) {
  Bf16 stored;
  const Scale scale = make_scale(s.largest_key, &stored);
  if (threadIdx.x == 0) in_global(s.block.scales)[s.scalars.newest_slot] = stored;
  return scale;
}

__device__ __forceinline__ int32 code_of(float value, const Scale& scale) {
  return __float2int_rn(fminf(fmaxf(value * scale.inverse, -kMaxCode), kMaxCode));
}

// What is left of a value when it is packed.
__device__ __forceinline__ float stored_value(float value, const Scale& scale) {
  return static_cast<float>(code_of(value, scale)) * scale.scale;
}

// The value of an entry as stored_entry() gives it.
template <class Traits>
__device__ __forceinline__ float value_of(uint32 entry, float scale) {
  if (!Traits::kPackedWindow) return as_float(entry & 0xffff0000u);
  return static_cast<float>(static_cast<int32>(entry << 8) >> 24) * scale;
}

// Indices or values that are not packed.
__device__ __forceinline__ uint16* wide(uint8* stored) { return reinterpret_cast<uint16*>(in_global(stored)); }

// Of entry number i of the window the index.
template <class Traits>
__device__ __forceinline__ uint32 stored_index(int i, const Block<Traits>& block) {
  if (!Traits::kPackedWindow) return wide(block.indices)[i];
  const uint32 slot = static_cast<uint32>(i) / static_cast<uint32>(block.num_kept()),
               place = i - slot * block.num_kept();
  const uint8* const bytes = in_global(block.indices) + slot * block.index_bytes + place / 2 * 3;
  return place % 2 == 0 ? bytes[0] | (bytes[1] & 15u) << 8 : bytes[1] >> 4 | bytes[2] << 4;
}

// Its index, and the bits of its value in the upper half.
template <class Traits>
__device__ __forceinline__ uint32 stored_entry(int i, const Block<Traits>& block) {
  const uint32 value = Traits::kPackedWindow ? in_global(block.values)[i] : wide(block.values)[i];
  return stored_index(i, block) | value << 16;
}

// Entry number `place` of the newest slot.
template <class Traits>
__device__ __forceinline__ void store_entry(int place, uint32 index, uint32 value, const Shared<Traits>& s) {
  const int i = s.scalars.newest_slot * s.block.num_kept() + place;
  wide(s.block.indices)[i] = static_cast<uint16>(index);
  wide(s.block.values)[i] = static_cast<uint16>(value);
}

// The three bytes that the index of entry number `place` of the newest slot shares with its neighbour's.
template <class Traits>
__device__ __forceinline__ uint8* newest_index(int place, const Shared<Traits>& s) {
  return in_global(s.block.indices) + s.scalars.newest_slot * s.block.index_bytes + place / 2 * 3;
}

// Entry number `place` of the newest slot, and the first bits of the `next` index, which share a byte with every second
// one. They are left alone where that entry is another warp's.
template <class Traits>
__device__ __forceinline__ void store_packed_index(int place, uint32 index, uint32 next, const Shared<Traits>& s) {
  uint8* const bytes = newest_index(place, s);
  if (place % 2 == 0) {
    bytes[0] = static_cast<uint8>(index);
    bytes[1] = static_cast<uint8>(index >> 8 | (next & 15u) << 4);
  } else {
    bytes[2] = static_cast<uint8>(index >> 4);
  }
}

// Entry number `place` of the newest slot: an element kept in a chunk, and the one kept after it or 0. `is_first` in
// its group.
template <class Traits>
__device__ __forceinline__ void store_kept(int chunk, int place, uint32 index, uint32 next, uint32 value, bool is_first,
                                           const Scale& scale, Shared<Traits>& s) {
  if constexpr (Traits::kPackedWindow) {
    store_packed_index(place, index, next, s);
    const int32 code = code_of(as_float(value << 16), scale);
    in_global(s.block.values)[s.scalars.newest_slot * s.block.num_kept() + place] = static_cast<uint8>(code);
    if (is_first && place % 2 == 1) s.first_kept[group_of<Traits>(chunk)] = index | static_cast<uint32>(place) << 16;
  } else {
    store_entry(place, index, value, s);
  }
}

// The bits that store_packed_index has left alone.
template <class Traits>
__device__ __forceinline__ void store_shared_bits(const Shared<Traits>& s) {
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < Traits::kGroups; i += Traits::kThreads) {
    const uint32 entry = s.first_kept[i];
    if (entry != kNothingShared) newest_index(entry >> 16, s)[1] |= static_cast<uint8>((entry & 15u) << 4);
  }
}

// The slot of a skipped block is stored empty: zeros at the first places, which add nothing anywhere.
template <class Traits>
__device__ __forceinline__ void store_empty_slot(const Shared<Traits>& s) {
#pragma unroll 1
  for (int i = threadIdx.x; i < s.block.num_kept(); i += Traits::kThreads) {
    if (Traits::kPackedWindow) {
      store_packed_index(i, i, i + 1 < s.block.num_kept() ? i + 1 : 0, s);
      in_global(s.block.values)[s.scalars.newest_slot * s.block.num_kept() + i] = 0;
    } else {
      store_entry(i, i, 0, s);
    }
  }
  if (Traits::kPackedWindow && threadIdx.x == 0) in_global(s.block.scales)[s.scalars.newest_slot].bits = 0;
}

}  // namespace microadam
