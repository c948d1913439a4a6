// Top-K: the num_kept largest keys |bf16(a)|, ties to the lowest index.
//
// Counting instead of sorting. A coarse count by binary exponent gives a lower bound of the k-th largest key: the one
// of the largest of every eight elements suffices, for there are at least as many elements above it. A fine count of
// the elements above that bound gives the key itself. Counts do not depend on the order of the threads.
#pragma once

#include "block.cuh"

namespace microadam {

constexpr int kMantissaBits = 7;
constexpr uint32 kNotFinite = 187u << kMantissaBits;  // the key of 2^60: from here on a magnitude is not finite

// |bf16(a)|, two to a word; with their signs they are stored where there is one section.
template <class Traits>
__device__ __forceinline__ void take_keys(const Elements<Traits>& a, Keys<Traits>& keys, Shared<Traits>& s) {
#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) keys[c][i] = bf16_pair(a[c][2 * i], a[c][2 * i + 1]);
    if (Traits::kChunks == 1) store_pairs(own_elements(s.keys), keys[c]);
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) keys[c][i] = in_register(keys[c][i] & 0x7fff7fffu);
  }
}

// Finds the bin with the element number `rank` (1: the largest) and its rank inside the bin. For one warp.
template <class Traits>
__device__ __forceinline__ void find_rank(const uint32* bins, uint32 rank, Shared<Traits>& s) {
  constexpr int kPerLane = kNumBins / kWarp;
  const int last = kNumBins - 1 - kPerLane * lane_of_thread();  // bin of this lane
  const uint4 high = *reinterpret_cast<const uint4*>(bins + last - 3);
  const uint4 low = *reinterpret_cast<const uint4*>(bins + last - 7);
  const uint32 counts[kPerLane] = {high.w, high.z, high.y, high.x, low.w, low.z, low.y, low.x};
  uint32 own = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) own += counts[i];
  const uint32 up_to_here = sum_up_to_lane(own);
  uint32 before = up_to_here - own;
  if (before >= rank || up_to_here < rank) return;
  uint32 bin = 0, rank_in_bin = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {  // the last one that does not have enough before it
    if (before < rank) {
      bin = last - i;
      rank_in_bin = rank - before;
    }
    before += counts[i];
  }
  s.found_bin = bin;
  s.found_rank = rank_in_bin;
}

constexpr uint32 kLastExponent = kNotFinite >> kMantissaBits;
constexpr int kCoarse = 8;  // elements of which the coarse count takes the largest

// Counts keys by exponent: of every eight the largest, or all. What is not finite lies in bin kLastExponent, zeros
// beyond the block in the first one, where they change nothing.
template <class Traits>
__device__ __forceinline__ void count_coarse(const Keys<Traits>& keys, bool all, Shared<Traits>& s) {
  const auto count = [&](uint32 pair) {  // the upper one
    atomicAdd(&s.bins.coarse[min(pair >> (16 + kMantissaBits), kLastExponent)], 1u);
  };
#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVector / 2; i += kCoarse / 2) {
      if (all) {
#pragma unroll
        for (int j = i; j < i + kCoarse / 2; ++j) {
          count(keys[c][j]);
          count(keys[c][j] << 16);
        }
      } else {
        uint32 largest = keys[c][i];
#pragma unroll
        for (int j = i + 1; j < i + kCoarse / 2; ++j) largest = max_pair_or_nan(largest, keys[c][j]);
        count(max_pair_or_nan(largest, largest << 16));
      }
    }
  }
}

// Counts the elements with a key from `base` on, by key; all far above it in the last bin.
template <class Traits>
__device__ __forceinline__ void count_fine(const Keys<Traits>& keys, uint32 base, Shared<Traits>& s) {
  // Every lane has a bin of its own for what lies below.
  const uint32 lowest = static_cast<uint32>(max(static_cast<int32>(base) - 1 - lane_of_thread(), 0)) * 0x10001u;
  const uint32 highest = (base + kNumBins - 1) * 0x10001u;
  // Shared memory has addresses of 16 bits.
  const uint32 origin = shared_address(s.bins.fine + kIgnoredBins) * 0x10001u - base * 0x40004u;
#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const uint32 addresses = min_pair(max_pair(keys[c][i], lowest), highest) * 4 + origin;
      count_at(addresses & 0xffffu);
      count_at(addresses >> 16);
    }
  }
}

template <class Traits>
__device__ __forceinline__ void clear_bins(Shared<Traits>& s) {
  constexpr int kVectors = sizeof(s.bins) / sizeof(uint4);
#pragma unroll
  for (int first = 0; first < kVectors; first += Traits::kThreads) {
    const int i = first + threadIdx.x;
    if (i < kVectors) reinterpret_cast<uint4*>(&s.bins)[i] = make_uint4(0, 0, 0, 0);
  }
  if constexpr (Traits::kPackedWindow) {
    if (threadIdx.x == 0) s.largest_key = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < Traits::kGroups; i += Traits::kThreads) s.first_kept[i] = kNothingShared;
  }
}

// The largest key of the block, for all threads after a barrier.
template <class Traits>
__device__ __forceinline__ void find_largest(const Keys<Traits>& keys, Shared<Traits>& s) {
  uint32 largest = 0;
#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) largest = max_pair(largest, keys[c][i]);
  }
  largest = __reduce_max_sync(kFullWarp, max(largest & 0xffffu, largest >> 16));
  if (lane_of_thread() == 0) atomicMax(&s.largest_key, largest);
}

struct Threshold {
  uint32 key;       // the num_kept-th largest
  uint32 num_ties;  // how many of the elements with that key are kept
};

// The bins are clear. Returns false when an element is not finite. Calls `beside_rank` once, in warps that have nothing
// else to do, with barriers before and after.
template <class Traits, class F>
__device__ __forceinline__ bool find_threshold(const Keys<Traits>& keys, int numel, int num_kept, Threshold* threshold,
                                               Shared<Traits>& s, const F& beside_rank) {
  bool all = num_kept > (numel + kCoarse - 1) / kCoarse;
  for (bool is_first = true;; is_first = false) {
    count_coarse(keys, all, s);
    __syncthreads();
    if (s.bins.coarse[kLastExponent] != 0) return false;
    if (threadIdx.x < kWarp) find_rank(s.bins.coarse, num_kept, s);
    if (is_first && (Traits::kWarps == 1 || threadIdx.x >= kWarp)) beside_rank();
    __syncthreads();
    const uint32 base = s.found_bin << kMantissaBits;
    count_fine(keys, base, s);
    __syncthreads();
    if (threadIdx.x < kWarp) find_rank(s.bins.fine + kIgnoredBins, num_kept, s);
    __syncthreads();
    threshold->key = base + s.found_bin;
    threshold->num_ties = s.found_rank;
    if (s.found_bin < kNumBins - 1) return true;
    // The bound was more than two exponents too low. That of all elements is exact.
    all = true;
    clear_bins(s);
    __syncthreads();
  }
}

// The elements of a chunk whose keys are at least `key`, as a mask. Two keys at a time: a difference of less than 2^15
// leaves the bit 2^15 above it set where it is not negative.
__device__ __forceinline__ uint32 reach(const uint32 (&keys)[kVector / 2], uint32 key) {
  const uint32 distance = (0x8000u - key) * 0x10001u;
  uint32 mask = 0;
#pragma unroll
  for (int i = kVector / 2 - 4; i >= 0; i -= 4) {
    const uint32 first = signs_of_halves(keys[i] + distance, keys[i + 1] + distance);
    const uint32 last = signs_of_halves(keys[i + 2] + distance, keys[i + 3] + distance);
    // Each byte keeps the bit of its element, and their sum is the mask of eight.
    const uint32 eight = __dp4a(last & 0x80402010u, 0x01010101u, __dp4a(first & 0x08040201u, 0x01010101u, 0u));
    mask = mask << 8 | eight;
  }
  return mask;
}

// Of the elements in a mask the first `count`.
__device__ __forceinline__ uint32 first_elements(uint32 mask, int count) {
#pragma unroll 1
  while (__popc(mask) > count) {
    mask ^= 1u << highest_bit(mask);
  }
  return mask;
}

// From how many elements in earlier lanes are in a list, and which of the lane's own.
__device__ __forceinline__ List make_list(int position, uint32 mask) {
  return {__shfl_sync(kFullWarp, position, kWarp / 2), __shfl_sync(kFullWarp, position + __popc(mask), kWarp - 1)};
}

// Kept are the elements above the threshold and the first `num_ties` of those at it. Counts of both kinds are packed:
// above the threshold in the lower 16 bits, at it in the upper ones.
template <class Traits>
__device__ __forceinline__ void mark_kept(const Keys<Traits>& keys, Threshold threshold, Kept (&kept)[Traits::kChunks],
                                          Shared<Traits>& s) {
  const int lane = lane_of_thread();
  uint32 ties[Traits::kChunks], before[Traits::kChunks];  // in the group
#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
    kept[c].mask = reach(keys[c], threshold.key + 1);
    ties[c] = reach(keys[c], threshold.key) ^ kept[c].mask;
    const uint32 own = __popc(kept[c].mask) | __popc(ties[c]) << 16;
    const uint32 up_to_here = sum_up_to_lane(own);
    if (lane == kWarp - 1) s.group_counts[group_of<Traits>(c)] = up_to_here;
    before[c] = up_to_here - own;
  }
  __syncthreads();
  uint32 counts[Traits::kCountsPerLane];
#pragma unroll
  for (int i = 0; i < Traits::kCountsPerLane; ++i) counts[i] = s.group_counts[kWarp * i + lane];
  const auto kept_of = [&](uint32 counts) { return (counts & 0xffffu) + min(counts >> 16, threshold.num_ties); };
#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
    uint32 before_group = 0;  // in the order of the elements
#pragma unroll
    for (int i = 0; i < Traits::kCountsPerLane; ++i) {
      before_group += kWarp * i + lane < group_of<Traits>(c) ? counts[i] : 0u;
    }
    before_group = __reduce_add_sync(kFullWarp, before_group);
    kept[c].before = kept_of(before_group);
    before[c] += before_group;
    kept[c].position = kept_of(before[c]) - kept[c].before;
    const uint32 ties_before = min(before[c] >> 16, threshold.num_ties);
    kept[c].mask |= first_elements(ties[c], threshold.num_ties - ties_before);
    kept[c].list = make_list(kept[c].position, kept[c].mask);
  }
}

}  // namespace microadam
