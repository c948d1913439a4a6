// One Top-K block on one thread block: what all phases of its step share.
//
// A block of up to kChunks * kSection elements lies in registers: chunk c of a thread are the eight elements from
// first_element(c) on. The chunks number c of all threads make up section c. So the elements are in order by section,
// then by thread, then by place in the chunk.
#pragma once

#include "launch.cuh"
#include "vectors.cuh"

namespace microadam {

constexpr int kThreads = MICROADAM_THREADS;
constexpr int kChunks = MICROADAM_CHUNKS;
constexpr int kWarps = kThreads / 32;
constexpr int kSection = kThreads * kVector;

#ifdef MICROADAM_HARNESS
// One build of the harness runs all settings.
static int kWindowSize, kBucketSize;
constexpr int kStageCapacity = 512;
constexpr int kListCapacity = kSection;
#else
constexpr int kWindowSize = MICROADAM_WINDOW_SIZE;
constexpr int kBucketSize = MICROADAM_BUCKET_SIZE;
constexpr int kMaxKept = MICROADAM_MAX_KEPT;  // of any block
constexpr int kStageCapacity = kWindowSize > 1 && kWindowSize * kMaxKept <= 1024 ? kWindowSize * kMaxKept : 1;
constexpr int kListCapacity = kMaxKept < kSection ? kMaxKept : kSection;
#endif

constexpr int kNumBins = 256;

struct Shared {
  // Sums of the window for the elements of one section: M and V, later the update in the place of M.
  alignas(16) float m_sums[kSection];
  alignas(16) float v_sums[kSection];
  alignas(16) uint32 coarse[kNumBins];
  alignas(16) uint32 fine[kNumBins];
  uint32 staged[kStageCapacity];    // the whole window: index | value << 16
  uint16 newest[kListCapacity];     // places in the section of the newest slot's elements
  uint32 warp_counts[kChunks * kWarps];
  uint32 found_bin, found_rank;
  int32 is_finite, section_kept;
};

template <class Param, class Grad>
struct Block {
  Param* param;
  const Grad* grad;
  Bf16* param_copy;
  uint8* codes;
  Bf16 *bucket_lo, *bucket_hi;
  uint16* indices;  // window_size slots of num_kept
  Bf16* values;
  int numel, num_kept;
};

__device__ __forceinline__ int first_element(int chunk) { return (chunk * kThreads + threadIdx.x) * kVector; }

// Where the row_major block number `index` of a run begins in a tensor that `extent` describes.
__device__ __forceinline__ int64 offset_of(const Extent& extent, uint32 row, uint32 col) {
  return extent.start + row * extent.row_stride + col * extent.size;
}

template <class Param, class Grad>
__device__ __forceinline__ Block<Param, Grad> find_block(const Tensor& tensor, const Run& run, uint32 index) {
  const uint32 row = run.cols == 0 ? 0 : index / static_cast<uint32>(run.cols);
  const uint32 col = run.cols == 0 ? index : index % static_cast<uint32>(run.cols);
  const int64 element = offset_of(run.elements, row, col);
  const int64 bucket = offset_of(run.buckets, row, col), kept = kWindowSize * offset_of(run.kept, row, col);
  Block<Param, Grad> block;
  block.param = static_cast<Param*>(tensor.param) + element;
  block.grad = static_cast<const Grad*>(tensor.grad) + element;
  block.param_copy = tensor.param_copy == nullptr ? nullptr : tensor.param_copy + element;
  block.codes = tensor.codes + offset_of(run.codes, row, col);
  block.bucket_lo = tensor.bucket_lo + bucket;
  block.bucket_hi = tensor.bucket_hi + bucket;
  block.indices = tensor.indices + kept;
  block.values = tensor.values + kept;
  block.numel = static_cast<int>(run.numel);
  block.num_kept = static_cast<int>(run.num_kept);
  return block;
}

}  // namespace microadam
