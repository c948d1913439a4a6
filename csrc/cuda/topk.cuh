// Top-K: the num_kept largest keys |bf16(a)|, ties to the lowest index.
//
// Counting instead of sorting. A coarse count by binary exponent gives a lower bound of the k-th largest key: the one
// of the largest magnitudes of all groups of eight suffices, for there are at least as many elements above it. A fine
// count of the elements above that bound gives the key itself. Counts do not depend on the order of the threads.
#pragma once

#include "block.cuh"

namespace microadam {

constexpr int kMantissaBits = 7;
constexpr uint32 kNotFinite = 187u << kMantissaBits;  // the key of 2^60: from here on a magnitude is not finite

// Bins begin with the largest keys. In the coarse count all that is not finite lies in the first one.
__device__ __forceinline__ int32 coarse_bin(float magnitude) {
  return max(static_cast<int32>(kNotFinite >> kMantissaBits) - (bf16_bits(magnitude) >> kMantissaBits), 0);
}

// The keys of a chunk with their signs: bf16(a), two to a word.
template <class Traits>
__device__ __forceinline__ void pack(const Elements<Traits>& a, Keys<Traits>& packed) {
#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) packed[c][i] = bf16_pair(a[c][2 * i], a[c][2 * i + 1]);
  }
}

// Finds the bin with the element number `rank` (1: the largest) and its rank inside the bin. For one warp.
template <class Traits>
__device__ __forceinline__ void find_rank(const uint32* bins, uint32 rank, Shared<Traits>& s) {
  constexpr int kPerLane = kNumBins / 32;
  const int lane = threadIdx.x;
  const uint4* const vectors = reinterpret_cast<const uint4*>(bins) + 2 * lane;
  const uint4 low = vectors[0], high = vectors[1];
  const uint32 counts[kPerLane] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
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
      bin = lane * kPerLane + i;
      rank_in_bin = rank - before;
    }
    before += counts[i];
  }
  s.found_bin = bin;
  s.found_rank = rank_in_bin;
}

// Counts by exponent: of every chunk the largest magnitude, or all elements.
template <class Traits>
__device__ __forceinline__ void count_coarse(const Elements<Traits>& a, int numel, bool all, Shared<Traits>& s) {
#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
    if (first_element<Traits>(c) >= numel) continue;
    if (all) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) atomicAdd(&s.coarse[coarse_bin(fabsf(a[c][j]))], 1u);
    } else {
      float largest = fabsf(a[c][0]);
#pragma unroll
      for (int j = 1; j < kVector; ++j) largest = max_or_nan(largest, fabsf(a[c][j]));
      atomicAdd(&s.coarse[coarse_bin(largest)], 1u);
    }
  }
}

// Counts the elements with a key from `base` on, by key; all far above it in the first bin.
template <class Traits>
__device__ __forceinline__ void count_fine(const Keys<Traits>& packed, uint32 base, Shared<Traits>& s) {
  const int32 largest = static_cast<int32>(base) + kNumBins - 1, ignored = kNumBins + threadIdx.x % 32;
  const auto count = [&](uint32 key) {  // without a branch
    atomicAdd(&s.fine[min(max(largest - static_cast<int32>(key), 0), ignored)], 1u);
  };
#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const uint32 keys = packed[c][i] & 0x7fff7fffu;
      count(keys & 0xffffu);
      count(keys >> 16);
    }
  }
}

template <class Traits>
__device__ __forceinline__ void clear_bins(Shared<Traits>& s) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kNumBins; i += Traits::kThreads) s.coarse[i] = s.fine[i] = 0;
  if (Traits::kPackedWindow && threadIdx.x == 0) s.largest_key = 0;
}

// The largest key of the block, for all threads after a barrier.
template <class Traits>
__device__ __forceinline__ void find_largest(const Keys<Traits>& packed, Shared<Traits>& s) {
  uint32 largest = 0;
#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      largest = max(largest, max(packed[c][i] & 0x7fffu, packed[c][i] >> 16 & 0x7fffu));
    }
  }
  largest = __reduce_max_sync(kFullWarp, largest);
  if (threadIdx.x % 32 == 0) atomicMax(&s.largest_key, largest);
}

struct Threshold {
  uint32 key;       // the num_kept-th largest
  uint32 num_ties;  // how many of the elements with that key are kept
};

// The bins are clear. Returns false when an element is not finite.
template <class Traits>
__device__ __forceinline__ bool find_threshold(const Elements<Traits>& a, const Keys<Traits>& packed, int numel,
                                               int num_kept, Threshold* threshold, Shared<Traits>& s) {
  bool all = num_kept > (numel + kVector - 1) / kVector;
  for (;;) {
    count_coarse(a, numel, all, s);
    __syncthreads();
    if (s.coarse[0] != 0) return false;
    if (threadIdx.x < 32) find_rank(s.coarse, num_kept, s);
    __syncthreads();
    const uint32 base = kNotFinite - (s.found_bin << kMantissaBits);
    count_fine(packed, base, s);
    __syncthreads();
    if (threadIdx.x < 32) find_rank(s.fine, num_kept, s);
    __syncthreads();
    threshold->key = base + kNumBins - 1 - s.found_bin;
    threshold->num_ties = s.found_rank;
    if (s.found_bin > 0) return true;
    // The bound was more than two exponents too low. That of all elements is exact.
    all = true;
    clear_bins(s);
    __syncthreads();
  }
}

// Where element j of a chunk has its bit in a mask: as `reach` makes them, not in order.
__device__ __forceinline__ constexpr int bit_of(int j) { return j < 4 ? 8 * j + 3 : 8 * j - 25; }

// The elements of a chunk whose keys are at least `key`, as a mask. Two keys at a time: a difference of less than 2^15
// leaves the bit 2^15 above it set where it is not negative.
__device__ __forceinline__ uint32 reach(const uint32 (&packed)[kVector / 2], uint32 key) {
  uint32 differences[kVector / 2];
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) differences[i] = (packed[i] | 0x80008000u) - key * 0x10001u;
  // The upper byte of each element's difference, of elements 0 to 3 and then the same for elements 4 to 7:
  //   byte               7      6      5      4         3      2      1      0
  //   differences[1]  | element 3   | element 2   |
  //   differences[0]                              |  element 1   | element 0   |
  //   0x7531 takes byte                                 7      5      3      1
  //   first                                       |  el. 3| el. 2| el. 1| el. 0|
  const uint32 first = __byte_perm(differences[0], differences[1], 0x7531);
  const uint32 last = __byte_perm(differences[2], differences[3], 0x7531);
  //   bits 31 to 0, and the elements that have them:   7...3...  6...2...  5...1...  4...0...
  return (first & 0x80808080u) >> 4 | (last & 0x80808080u);
}

// Of the elements in a mask the first `count`.
__device__ __forceinline__ uint32 first_elements(uint32 mask, int count) {
#pragma unroll 1
  for (int j = kVector - 1; __popc(mask) > count; --j) mask &= ~(1u << bit_of(j));
  return mask;
}

// Kept are the elements above the threshold and the first `num_ties` of those at it. Counts of both kinds are packed:
// above the threshold in the lower 16 bits, at it in the upper ones.
template <class Traits>
__device__ __forceinline__ void mark_kept(const Keys<Traits>& packed, Threshold threshold,
                                          Kept (&kept)[Traits::kChunks], Shared<Traits>& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32 ties[Traits::kChunks], before[Traits::kChunks];
#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
    kept[c].mask = reach(packed[c], threshold.key + 1);
    ties[c] = reach(packed[c], threshold.key) ^ kept[c].mask;
    const uint32 own = __popc(kept[c].mask) | __popc(ties[c]) << 16;
    const uint32 up_to_here = sum_up_to_lane(own);
    if (lane == 31) s.warp_counts[c * Traits::kWarps + warp] = up_to_here;
    before[c] = up_to_here - own;
  }
  __syncthreads();
  uint32 counts[Traits::kCountsPerLane];
#pragma unroll
  for (int i = 0; i < Traits::kCountsPerLane; ++i) counts[i] = s.warp_counts[32 * i + lane];
  const auto sum_before = [&](int end) {  // of all warps before this one, in the order of the elements
    uint32 sum = 0;
#pragma unroll
    for (int i = 0; i < Traits::kCountsPerLane; ++i) sum += 32 * i + lane < end ? counts[i] : 0u;
    return __reduce_add_sync(kFullWarp, sum);
  };
  const auto kept_of = [&](uint32 counts) { return (counts & 0xffffu) + min(counts >> 16, threshold.num_ties); };
#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
    before[c] += sum_before(c * Traits::kWarps + warp);
    kept[c].position = kept_of(before[c]);
    kept[c].section = c == 0 ? 0 : kept_of(sum_before(c * Traits::kWarps));
    const uint32 ties_before = min(before[c] >> 16, threshold.num_ties);
    kept[c].mask |= first_elements(ties[c], threshold.num_ties - ties_before);
  }
}

}  // namespace microadam
