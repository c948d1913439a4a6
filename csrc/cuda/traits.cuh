// What a kernel is compiled for, as one type that all phases take as their template parameter `Traits`.
#pragma once

#include "vectors.cuh"

namespace microadam {

// Settings, as in settings.cuh, and what follows from them.
//
// A block of up to kChunks * kSection elements lies in registers: chunk c of a thread are the eight elements from
// first_element(c) on. The chunks number c of all threads make up section c. So the elements are in order by section,
// then by thread, then by place in the chunk.
template <class Settings>
struct KernelTraits : Settings {
  static constexpr int kWarps = Settings::kThreads / 32;
  static constexpr int kSection = Settings::kThreads * kVector;
  static constexpr int kCapacity = Settings::kChunks * kSection;
  static constexpr int kCountsPerLane = (Settings::kChunks * kWarps + 31) / 32;

  static constexpr bool kHasWindow = Settings::kWindowSize > 1;
  // Entries of the window in shared memory: all of them, or it is not worth it.
  static constexpr int kWindowEntries = Settings::kWindowSize * Settings::kMaxKept;
  static constexpr int kStageCapacity = kHasWindow && kWindowEntries <= 1024 ? kWindowEntries : 1;
  // Kept elements of a section that are listed at once.
  static constexpr int kListCapacity = Settings::kMaxKept < 2048 ? Settings::kMaxKept : 2048;
  static constexpr bool kListHoldsSection = Settings::kMaxKept <= kListCapacity || kSection <= kListCapacity;

  // Whether a bucket lies in the same chunk of one thread or of neighbouring threads of a warp.
  static constexpr bool kBucketsFitWarps = Settings::kBucketSize % kVector == 0 &&
                                           Settings::kBucketSize <= 32 * kVector &&
                                           (Settings::kBucketSize & (Settings::kBucketSize - 1)) == 0;
};

}  // namespace microadam
