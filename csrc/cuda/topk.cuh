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

// The bin of a key in the coarse count; all that is not finite lies in the last one.
constexpr uint32 kFirstBin = kNumBins - 1 - (kNotFinite >> kMantissaBits);
__device__ __forceinline__ uint32 coarse_bin(float magnitude) {
  return min((bf16_bits(magnitude) >> kMantissaBits) + kFirstBin, kNumBins - 1u);
}

// The smallest magnitude that rounds to the bf16 number with these bits, or above.
__device__ __forceinline__ float rounds_up_to(uint32 key) {
  return as_float(key == 0 ? 0u : (key << 16) - 0x8000u + (key & 1u));
}

// Finds the bin with the element number `rank` (1: the largest) and its rank inside the bin. For one warp.
__device__ __forceinline__ void find_rank(const uint32* bins, uint32 rank, Shared& s) {
  constexpr int kPerLane = kNumBins / 32;
  const int lane = threadIdx.x;
  const uint4* const vectors = reinterpret_cast<const uint4*>(bins) + 2 * lane;
  const uint4 low = vectors[0], high = vectors[1];
  const uint32 counts[kPerLane] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  uint32 own = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) own += counts[i];
  uint32 from_here = own;  // elements in the bins of this lane and above
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32 other = __shfl_down_sync(kFullWarp, from_here, distance);
    if (lane + distance < 32) from_here += other;
  }
  uint32 above = from_here - own;
  if (above >= rank || rank > from_here) return;
  uint32 bin = 0, rank_in_bin = 0;
#pragma unroll
  for (int i = kPerLane - 1; i >= 0; --i) {  // the last one that does not have enough above it
    if (above < rank) {
      bin = lane * kPerLane + i;
      rank_in_bin = rank - above;
    }
    above += counts[i];
  }
  s.found_bin = bin;
  s.found_rank = rank_in_bin;
}

// Counts by exponent: of every chunk the largest magnitude, or all elements.
__device__ __forceinline__ void count_coarse(const float (&a)[kChunks][kVector], int numel, bool all, Shared& s) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (first_element(c) >= numel) continue;
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

// Counts the elements with a key from `base` on, by key; all far above it in the last bin.
__device__ __forceinline__ void count_fine(const float (&a)[kChunks][kVector], uint32 base, Shared& s) {
  const float bound = rounds_up_to(base);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (fabsf(a[c][j]) >= bound) {
        atomicAdd(&s.fine[min(bf16_bits(fabsf(a[c][j])) - base, kNumBins - 1u)], 1u);
      }
    }
  }
}

__device__ __forceinline__ void clear_bins(Shared& s) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kNumBins; i += kThreads) s.coarse[i] = s.fine[i] = 0;
}

struct Threshold {
  uint32 key;       // the num_kept-th largest
  uint32 num_ties;  // how many of the elements with that key are kept
};

// The bins are clear. Returns false when an element is not finite.
__device__ __forceinline__ bool find_threshold(const float (&a)[kChunks][kVector], int numel, int num_kept,
                                               Threshold* threshold, Shared& s) {
  bool all = num_kept > (numel + kVector - 1) / kVector;
  for (;;) {
    count_coarse(a, numel, all, s);
    __syncthreads();
    if (s.coarse[kNumBins - 1] != 0) return false;
    if (threadIdx.x < 32) find_rank(s.coarse, num_kept, s);
    __syncthreads();
    const uint32 base = (s.found_bin - kFirstBin) << kMantissaBits;
    count_fine(a, base, s);
    __syncthreads();
    if (threadIdx.x < 32) find_rank(s.fine, num_kept, s);
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

// Of the bits in `mask` the lowest `count`.
__device__ __forceinline__ uint32 lowest_bits(uint32 mask, int count) {
  while (__popc(mask) > count) mask ^= 1u << (31 - __clz(mask));
  return mask;
}

// Sum of the counts of all warps before number `end`, in the order of the elements. For a whole warp.
__device__ __forceinline__ uint32 sum_before(int end, const Shared& s) {
  uint32 sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < end; i += 32) sum += s.warp_counts[i];
  return __reduce_add_sync(kFullWarp, sum);
}

// Kept are the elements above the threshold and the first `num_ties` of those at it. Counts of both kinds are packed:
// above the threshold in the lower 16 bits, at it in the upper ones.
__device__ __forceinline__ void mark_kept(const float (&a)[kChunks][kVector], Threshold threshold,
                                          Kept (&kept)[kChunks], Shared& s) {
  const float at_least = rounds_up_to(threshold.key), above = rounds_up_to(threshold.key + 1);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32 ties[kChunks], before[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    kept[c].mask = ties[c] = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (fabsf(a[c][j]) >= at_least) ties[c] |= 1u << j;
      if (fabsf(a[c][j]) >= above) kept[c].mask |= 1u << j;
    }
    ties[c] ^= kept[c].mask;
    const uint32 own = __popc(kept[c].mask) | __popc(ties[c]) << 16;
    uint32 up_to_here = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32 other = __shfl_up_sync(kFullWarp, up_to_here, distance);
      if (lane >= distance) up_to_here += other;
    }
    if (lane == 31) s.warp_counts[c * kWarps + warp] = up_to_here;
    before[c] = up_to_here - own;
  }
  __syncthreads();
  const auto kept_of = [&](uint32 counts) { return (counts & 0xffffu) + min(counts >> 16, threshold.num_ties); };
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    before[c] += sum_before(c * kWarps + warp, s);
    kept[c].position = kept_of(before[c]);
    kept[c].section = c == 0 ? 0 : kept_of(sum_before(c * kWarps, s));
    const uint32 ties_before = min(before[c] >> 16, threshold.num_ties);
    kept[c].mask |= lowest_bits(ties[c], threshold.num_ties - ties_before);
  }
}

}  // namespace microadam
