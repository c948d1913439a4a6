// One Top-K block on one thread block: what all phases of its step share.
#pragma once

#include "launch.cuh"
#include "rounding.cuh"
#include "traits.cuh"

namespace microadam {

constexpr int kNumBins = 256;
constexpr uint32 kNothingShared = 0xffffffffu;  // in first_kept: the entry before is not another warp's
constexpr int kIgnoredBins = kWarp;             // count what nobody asks for, one for each lane

// What a thread holds of a block, by chunk: the accumulator, then the residual; and the keys, two to a word.
template <class Traits>
using Elements = float[Traits::kChunks][kVector];
template <class Traits>
using Keys = uint32[Traits::kChunks][kVector / 2];

// What the end of a step needs, read from shared memory at once.
struct alignas(8) Ending {
  float decay;
  uint32 counter;  // of the block's first element, see rounding.cuh
};

template <class Traits>
struct Block {
  typename Traits::Param* param;
  const typename Traits::Grad* grad;
  uint8* codes;
  Bf16 *bucket_lo, *bucket_hi, *bucket_scale;
  uint8 *indices, *values;    // kWindowSize slots of num_kept, see slot.cuh
  Bf16* scales;               // one for each slot of a packed window
  int32 length, kept_length;  // read by numel() and num_kept()
  int32 index_bytes;          // of a slot
  Ending ending;

  __device__ __forceinline__ int numel() const { return Traits::kLength != 0 ? Traits::kLength : length; }
  __device__ __forceinline__ int num_kept() const { return Traits::kLength != 0 ? Traits::kMaxKept : kept_length; }
};

// How many elements Shared::places lists of a group.
struct List {
  int in_first_half, count;
};

// The elements of a chunk that are kept.
struct Kept {
  uint32 mask;   // bit j for element j
  int position;  // how many are kept before them in the group
  int before;    // how many are kept before the group
  List list;
};

template <class Traits>
struct Shared {
  // For the elements of one section, each group's part for its warp: see group_space and swizzled.
  alignas(16) float update[Traits::kSection];                                  // before: sum of the window, M
  alignas(16) float v_sums[Traits::kHasWindow ? Traits::kSection : 1];         // V
  alignas(16) uint16 touched[Traits::kHasWindow ? Traits::kSection / 16 : 1];  // one bit for each element in the sums
  alignas(16) uint16 keys[Traits::kSection];
  alignas(16) typename Traits::Param weights[Traits::kCopiesAhead ? Traits::kSection : 1];
  union {
    uint32 staged[Traits::kIsStaged ? Traits::kWindowEntries : 1];  // the window, as stored_entry() gives it; and later
    uint8 places[Traits::kSection];                                 // a list of elements, each in its half of the group
  };

  struct {
    alignas(16) uint32 coarse[kNumBins];
    uint32 fine[kIgnoredBins + kNumBins];
  } bins;
  uint32 group_counts[kWarp * Traits::kCountsPerLane];  // kGroups of them are used
  uint32 found_bin, found_rank;

  uint32 first_kept[Traits::kPackedWindow ? Traits::kGroups : 1];  // of a group: index | place in the slot << 16

  uint32 largest_key;
  uint32 run;      // number of the run
  bool is_sparse;  // it is to be done, on the Top-K path
  Scalars scalars;
  Block<Traits> block;
};

// Where an element of a group has its update: lanes that read four neighbours of their own elements meet no bank twice.
__device__ __forceinline__ int swizzled(int place) { return place ^ (place >> 3 & 12); }

// The part of an array of Shared, one element for each of a section's, that belongs to this warp.
template <class T>
__device__ __forceinline__ T* group_space(T* array) {
  return array + threadIdx.x / kWarp * kGroup;
}

template <class Traits>
__device__ __forceinline__ int first_element(int chunk) {
  __builtin_assume(threadIdx.x < Traits::kThreads);
  return (chunk * Traits::kThreads + threadIdx.x) * kVector;
}

__device__ __forceinline__ int lane_of_thread() { return threadIdx.x % kWarp; }

// The part of such an array that belongs to this thread.
template <class T>
__device__ __forceinline__ T* own_elements(T* array) {
  return array + threadIdx.x * kVector;
}

template <class Traits>
__device__ __forceinline__ int group_of(int chunk) {
  return chunk * Traits::kWarps + threadIdx.x / kWarp;
}

__device__ __forceinline__ int64 offset_of(const Extent& extent, uint32 row, uint32 col) {
  return extent.start + row * extent.row_stride + col * extent.size;
}

__device__ __forceinline__ uint32 counter_of(const Place& place, uint32 step_key, int64 element) {
  return static_cast<uint32>(place.origin + element) * kPositionFactor +
         mix(step_key ^ static_cast<uint32>(place.shape_key));
}

// Block number `index` of a run.
template <class Traits>
__device__ __forceinline__ Block<Traits> find_block(const Tensor& tensor, const Run& run, uint32 index,
                                                    const Scalars& scalars) {
  uint32 row = 0, col = index;
  if (run.cols != 0) {
    row = index / static_cast<uint32>(run.cols);
    col = index % static_cast<uint32>(run.cols);
  }
  const int64 element = offset_of(run.elements, row, col), bucket = offset_of(run.buckets, row, col);
  Block<Traits> block = {};
  block.param = static_cast<typename Traits::Param*>(tensor.param) + element;
  block.grad = static_cast<const typename Traits::Grad*>(tensor.grad) + element;
  block.codes = tensor.codes + offset_of(run.codes, row, col);
  block.bucket_lo = tensor.bucket_lo + bucket;
  block.bucket_hi = tensor.bucket_hi + bucket;
  block.bucket_scale = tensor.bucket_scale + bucket;
  block.length = static_cast<int32>(run.numel);
  block.kept_length = static_cast<int32>(run.num_kept);
  block.ending.decay = scalars.decay;
  if (Traits::kStochastic) block.ending.counter = counter_of(run.place, scalars.step_key, element);
  if (Traits::kHasWindow) {
    const int64 value = Traits::kWindowSize * offset_of(run.values, row, col);
    block.indices = tensor.indices + Traits::kWindowSize * offset_of(run.indices, row, col);
    block.values = tensor.values + (Traits::kPackedWindow ? value : static_cast<int64>(sizeof(Bf16)) * value);
  }
  if (Traits::kPackedWindow) {
    block.scales = tensor.scales + Traits::kWindowSize * offset_of(run.scales, row, col);
    block.index_bytes = static_cast<int32>(run.indices.size);
  }
  return block;
}

}  // namespace microadam
