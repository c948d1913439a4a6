// One Top-K block on one thread block: what all phases of its step share.
#pragma once

#include "launch.cuh"
#include "rounding.cuh"
#include "traits.cuh"

namespace microadam {

constexpr int kNumBins = 256;

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
  Bf16 *bucket_lo, *bucket_hi;
  uint8 *indices, *values;  // kWindowSize slots of num_kept, see slot.cuh
  Bf16* scales;             // one for each slot of a packed window
  int32 numel, num_kept;
  int32 index_bytes;  // of a slot
  Ending ending;
};

// The elements of a chunk that are kept.
struct Kept {
  uint32 mask;   // one bit for each, see bit_of
  int position;  // how many are kept before them in the block ...
  int section;   // ... and before their section
};

template <class Traits>
struct Shared {
  // Sums of the window for the elements of one section, M and V; later the update takes the place of M.
  alignas(16) float m_sums[Traits::kSection];
  alignas(16) float v_sums[Traits::kSection];
  alignas(16) uint32 coarse[kNumBins];
  alignas(16) uint32 fine[kNumBins + 32];           // the last ones count what nobody asks for, one for each lane
  uint32 staged[Traits::kStageCapacity];            // the whole window, see window_entry
  uint32 list[Traits::kListCapacity];               // kept elements: place in the section | value << 16
  uint32 warp_counts[32 * Traits::kCountsPerLane];  // kChunks * kWarps of them are used
  uint32 found_bin, found_rank;
  int32 section_kept;
  Scalars scalars;
  Block<Traits> block;
  uint32 largest_key;
};

template <class Traits>
__device__ __forceinline__ int first_element(int chunk) {
  return (chunk * Traits::kThreads + threadIdx.x) * kVector;
}

__device__ __forceinline__ uint32 code_offset(int element) { return static_cast<uint32>(element) / 2; }

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
  block.numel = static_cast<int32>(run.numel);
  block.num_kept = static_cast<int32>(run.num_kept);
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
