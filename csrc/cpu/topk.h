// Top-K: the k largest |bf16(a)| of a block, ties to the lowest index, without sorting.
//
// Keys are the bits of |bf16(a)|. The k-th largest of the groups' maxima is a lower bound of the k-th largest key, so
// one pass over the block collects few more than k candidates, and the exact threshold is found among them.
#pragma once

#include "kernel.h"
#include "vector_loops.h"

namespace microadam {
namespace {

// Bits of the smallest fp32 magnitude that is skipped: it rounds to a bf16 of 2**60 (key 0x5D80) or above. Inf and NaN
// have larger ones.
constexpr int32_t kNotFinite = (0x5D80 << 16) - 0x8000;

constexpr uint32_t kOctave = 128;       // keys between a number and its double
constexpr uint32_t kFirstDistance = 4;  // keys

// Numbers of `bits` (n of them, rounded up to whole vectors) that are at least `threshold` without their sign.
inline int count_at_least(const uint32_t* bits, int n, uint32_t threshold) {
  const Ints limit = splat(static_cast<int32_t>(threshold));
  Ints counts = splat(0);
  for (int i = 0; i < n; i += kLanes) {
    counts = count_at_least(counts, load_ints(bits + i) & splat(0x7FFFFFFF), limit);
  }
  return reduce_add(counts);
}

// Fewer, larger groups, as long as there are twice as many as wanted: the bound stays good and is found faster.
inline int merge_groups(uint32_t* maxima, int num_groups, int num_kept) {
  while (num_groups > 4 * kLanes && num_groups / 4 >= 2 * num_kept) {
    const int padded = round_up(num_groups, 4 * kLanes);
    for (int i = num_groups; i < padded; i += kTile / kGroup) memset(maxima + i, 0, kTile / kGroup * sizeof *maxima);
    for (int i = 0; i < padded; i += 4 * kLanes) {
      const Ints a = max(load_ints(maxima + i), load_ints(maxima + i + kLanes));
      const Ints b = max(load_ints(maxima + i + 2 * kLanes), load_ints(maxima + i + 3 * kLanes));
      store_ints(maxima + i / 4, max(a, b));
    }
    num_groups = padded / 4;
  }
  return num_groups;
}

inline int32_t largest_of(const uint32_t* maxima, int n) {
  Ints largest = splat(0);
  for (int i = 0; i < n; i += kLanes) largest = max(largest, load_ints(maxima + i));
  return reduce_max(largest);
}

// The searches below find the largest key that at least k of some magnitudes reach, or one at most `slack` below it.
// `count(key)` tells how many reach a key; `key` is reached by at least k, `end` by less.
template <class Count>
inline uint32_t bisect(uint32_t key, uint32_t end, uint32_t slack, int num_kept, const Count& count) {
  while (end - key > slack) {
    const uint32_t middle = key + (end - key) / 2;
    if (count(middle) >= num_kept) {
      key = middle;
    } else {
      end = middle;
    }
  }
  return key;
}

template <class Count>
inline uint32_t search_up(uint32_t key, uint32_t end, uint32_t slack, int num_kept, const Count& count) {
  for (uint32_t distance = kFirstDistance; key + distance < end; distance *= 2) {
    if (count(key + distance) < num_kept) return bisect(key, key + distance, slack, num_kept, count);
    key += distance;
  }
  return bisect(key, end, slack, num_kept, count);
}

template <class Count>
inline uint32_t search_down(uint32_t end, uint32_t slack, int num_kept, const Count& count) {
  for (uint32_t distance = kFirstDistance; end > distance; distance *= 2) {
    if (count(end - distance) >= num_kept) return bisect(end - distance, end, slack, num_kept, count);
    end -= distance;
  }
  return bisect(0, end, slack, num_kept, count);
}

// A lower bound of the k-th largest key. Starts at the one of the thread's block before, which is most often near.
inline uint32_t lower_bound(const Block& block, const Scratch& s, int num_groups, uint32_t largest) {
  const bool enough_groups = num_groups >= block.num_kept;
  const uint32_t* bits = enough_groups ? s.maxima : reinterpret_cast<const uint32_t*>(s.accumulator);
  const int n = enough_groups ? num_groups : round_up(block.numel, kTile);
  const auto count = [=](uint32_t key) { return count_at_least(bits, n, smallest_with_key(key)); };

  const uint32_t slack = enough_groups ? 4 : 1;
  const uint32_t end = bf16_bits(largest) + 1;
  uint32_t start = *s.last_key;
  if (start >= end || end - start > 4 * kOctave) start = end > kOctave ? end - kOctave : 0;
  const bool reached = start == 0 || count(start) >= block.num_kept;
  const uint32_t key =
      reached ? search_up(start, end, slack, block.num_kept, count) : search_down(start, slack, block.num_kept, count);
  *s.last_key = key;
  return key;
}

// Positions whose key is at least `key`, ascending. Returns their number.
inline int collect_candidates(const Block& block, int64_t param_bytes, uint32_t key, const Scratch& s) {
  const float* accumulator = s.accumulator;
  uint16_t* candidates = s.candidates;
  const int numel = block.numel;
  const Ints below = splat(static_cast<int32_t>(smallest_with_key(key)) - 1);
  Prefetcher weights = prefetch_half(block.param, param_bytes, numel, 1);
  int count = 0;
  for (int i = 0; i < numel; i += kTile) {
    weights.ask();
    Floats tile[kTileVectors];
    for (int j = 0; j < kTileVectors; ++j) tile[j] = load(accumulator + i + j * kLanes);
    count += append_tile(candidates + count, i, tile, below);
  }
  // Beyond the block lie zeros, which are candidates when the key is 0.
  while (count > 0 && candidates[count - 1] >= numel) --count;
  return count;
}

// The accumulator at the candidates, and zeros up to a whole vector.
inline void gather_candidates(const Scratch& s, int num_candidates) {
  const float* accumulator = s.accumulator;
  const uint16_t* candidates = s.candidates;
  uint32_t* bits = s.candidate_bits;
  for (int i = 0; i < num_candidates; ++i) bits[i] = float_bits(accumulator[candidates[i]]);
  for (int i = num_candidates; i < num_candidates + kLanes; ++i) bits[i] = 0;
}

// Writes the candidates above the threshold, and the first ones at it, to the newest slot.
inline void store_newest(const Scratch& s, int num_candidates, int num_kept, uint32_t threshold) {
  const uint16_t* candidates = s.candidates;
  const uint32_t* bits = s.candidate_bits;
  uint16_t* indices = s.indices;
  Bf16* values = s.values;
  const Ints key = splat(static_cast<int32_t>(threshold));
  int at_threshold = num_kept - count_at_least(bits, num_candidates, smallest_with_key(threshold + 1));
  int count = 0;
  for (int i = 0; i < num_candidates; i += kLanes) {
    const Ints rounded = bf16_bits(load_ints(bits + i));
    const Ints keys = rounded & splat(0x7FFF);
    const uint32_t tied = first_bits(lane_bits(equal(key, keys)), at_threshold);
    const uint32_t chosen = lane_bits(less(key, keys)) | tied;
    at_threshold -= __builtin_popcount(tied);
    append(&values[count].bits, rounded, chosen);
    count += append(indices + count, load_shorts(candidates + i), chosen);
  }
}

// I = the k largest keys, ties to the lowest index, ascending; V = bf16(a[I]); to the newest slot.
// Returns false when the accumulator is not finite.
inline bool largest_magnitudes(const Block& block, const Step& step, const Scratch& s) {
  const int num_groups = merge_groups(s.maxima, round_up(block.numel, kTile) / kGroup, block.num_kept);
  const int32_t largest = largest_of(s.maxima, num_groups);
  if (largest >= kNotFinite) return false;
  const uint32_t key = lower_bound(block, s, num_groups, static_cast<uint32_t>(largest));
  const int num_candidates = collect_candidates(block, element_bytes(step.param_dtype), key, s);
  gather_candidates(s, num_candidates);
  uint32_t threshold = key;
  if (num_candidates > block.num_kept) {
    const auto count = [&](uint32_t at_least) {
      return count_at_least(s.candidate_bits, num_candidates, smallest_with_key(at_least));
    };
    threshold = search_up(key, bf16_bits(static_cast<uint32_t>(largest)) + 1, 1, block.num_kept, count);
  }
  store_newest(s, num_candidates, block.num_kept, threshold);
  return true;
}

}  // namespace
}  // namespace microadam
