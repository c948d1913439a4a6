// One Top-K block on one thread block: what all phases of its step share.
//
// A block of up to kChunks * kSection elements lies in registers: chunk c of a thread are the eight elements from
// first_element(c) on. The chunks number c of all threads make up section c. So the elements are in order by section,
// then by thread, then by place in the chunk.
#pragma once

#include "launch.cuh"
#include "vectors.cuh"

namespace microadam {

using Param = MICROADAM_PARAM;
using Grad = MICROADAM_GRAD;

constexpr bool kReplays = MICROADAM_REPLAY;
constexpr int kThreads = MICROADAM_THREADS;
constexpr int kChunks = MICROADAM_CHUNKS;
constexpr int kWarps = kThreads / 32;
constexpr int kSection = kThreads * kVector;
constexpr int kNumBins = 256;
constexpr int kCountsPerLane = (kChunks * kWarps + 31) / 32;

#ifdef MICROADAM_HARNESS
// One build of the harness runs all settings. Small capacities, so that tests exceed them.
static int kWindowSize, kBucketSize;
static bool kPackedWindow;
constexpr int kStageCapacity = 512;
constexpr int kListCapacity = 64;
constexpr bool kListHoldsSection = false;
#else
constexpr int kWindowSize = MICROADAM_WINDOW_SIZE;
constexpr int kBucketSize = MICROADAM_BUCKET_SIZE;
constexpr bool kPackedWindow = MICROADAM_PACKED_WINDOW;
constexpr int kMaxKept = MICROADAM_MAX_KEPT;  // of any block
constexpr int kStageCapacity = kWindowSize > 1 && kWindowSize * kMaxKept <= 1024 ? kWindowSize * kMaxKept : 1;
constexpr int kListCapacity = kMaxKept < 2048 ? kMaxKept : 2048;
constexpr bool kListHoldsSection = kMaxKept <= kListCapacity || kSection <= kListCapacity;
#endif

struct Block {
  Param* param;
  const Grad* grad;
  uint8* codes;
  Bf16 *bucket_lo, *bucket_hi;
  uint8 *indices, *values;  // kWindowSize slots of num_kept, see slot.cuh
  Bf16* scales;             // one for each slot of a packed window
  int32 numel, num_kept;
  int32 index_bytes;  // of a slot
};

// The elements of a chunk that are kept.
struct Kept {
  uint32 mask;   // one bit for each, see bit_of
  int position;  // how many are kept before them in the block ...
  int section;   // ... and before their section
};

struct Shared {
  // Sums of the window for the elements of one section, M and V; later the update takes the place of M.
  alignas(16) float m_sums[kSection];
  alignas(16) float v_sums[kSection];
  alignas(16) uint32 coarse[kNumBins];
  alignas(16) uint32 fine[kNumBins + 32];  // the last ones count what nobody asks for, one for each lane
  uint32 staged[kStageCapacity];  // the whole window, see window_entry
  uint32 list[kListCapacity];     // kept elements: place in the section | value << 16
  uint32 warp_counts[32 * kCountsPerLane];  // kChunks * kWarps of them are used
  uint32 found_bin, found_rank;
  int32 section_kept;
  Scalars scalars;
  Block block;
  uint32 largest_key;
};

__device__ __forceinline__ int first_element(int chunk) { return (chunk * kThreads + threadIdx.x) * kVector; }

__device__ __forceinline__ uint32 code_offset(int element) { return static_cast<uint32>(element) / 2; }

__device__ __forceinline__ int64 offset_of(const Extent& extent, uint32 row, uint32 col) {
  return extent.start + row * extent.row_stride + col * extent.size;
}

// Block number `index` of a run.
__device__ __forceinline__ Block find_block(const Tensor& tensor, const Run& run, uint32 index) {
  uint32 row = 0, col = index;
  if (run.cols != 0) {
    row = index / static_cast<uint32>(run.cols);
    col = index % static_cast<uint32>(run.cols);
  }
  const int64 element = offset_of(run.elements, row, col), bucket = offset_of(run.buckets, row, col);
  Block block = {};
  block.param = static_cast<Param*>(tensor.param) + element;
  block.grad = static_cast<const Grad*>(tensor.grad) + element;
  block.codes = tensor.codes + offset_of(run.codes, row, col);
  block.bucket_lo = tensor.bucket_lo + bucket;
  block.bucket_hi = tensor.bucket_hi + bucket;
  block.numel = static_cast<int32>(run.numel);
  block.num_kept = static_cast<int32>(run.num_kept);
  if (kWindowSize > 1) {
    const int64 value = kWindowSize * offset_of(run.values, row, col);
    block.indices = tensor.indices + kWindowSize * offset_of(run.indices, row, col);
    block.values = tensor.values + (kPackedWindow ? value : static_cast<int64>(sizeof(Bf16)) * value);
  }
  if (kPackedWindow) {
    block.scales = tensor.scales + kWindowSize * offset_of(run.scales, row, col);
    block.index_bytes = static_cast<int32>(run.indices.size);
  }
  return block;
}

}  // namespace microadam
