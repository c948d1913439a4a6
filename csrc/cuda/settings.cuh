// The settings of this compilation, from its macros, which nothing else reads.
#pragma once

#include "device.cuh"

namespace microadam {

struct Settings {
  using Param = MICROADAM_PARAM;  // element types: Fp32, Bf16 or Fp16
  using Grad = MICROADAM_GRAD;
  // There is no gradient, the newest slot is in the window already, and only the weights are updated.
  static constexpr bool kReplays = MICROADAM_REPLAY;
  static constexpr bool kAligned = MICROADAM_ALIGNED;  // whether all blocks begin where vectors can be read
  static constexpr int kThreads = MICROADAM_THREADS;   // of a thread block, a multiple of 32
  static constexpr int kChunks = MICROADAM_CHUNKS;  // of sixteen elements a thread holds: enough for the longest block
  static constexpr int kMinBlocks = MICROADAM_MIN_BLOCKS;  // thread blocks that shall fit a multiprocessor at once
  static constexpr int kWindowSize = MICROADAM_WINDOW_SIZE;
  static constexpr int kBucketSize = MICROADAM_BUCKET_SIZE;
  static constexpr int kLevels = MICROADAM_LEVELS;                // the largest error-feedback code; 0: there are none
  static constexpr int kLength = MICROADAM_LENGTH;                // of all blocks, or 0 where it is not the same
  static constexpr int kMaxKept = MICROADAM_MAX_KEPT;             // of any block
  static constexpr bool kPackedWindow = MICROADAM_PACKED_WINDOW;  // 12-bit indices and 8-bit values
  static constexpr bool kStochastic = MICROADAM_STOCHASTIC;       // how weights, which are bf16 then, are rounded
};

}  // namespace microadam
