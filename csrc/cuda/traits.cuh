// What a kernel is compiled for, as one type that all phases take as their template parameter `Traits`.
#pragma once

#include "vectors.cuh"

namespace microadam {

constexpr int kGroup = kWarp * kVector;

// Settings, as in settings.cuh, and what follows from them.
//
// A block of up to kChunks * kSection elements lies in registers: chunk c of a thread are the kVector elements from
// first_element(c) on. The chunks number c of a warp make up a group, those of all threads section c. So the elements
// are in order by section, then by group, then by thread, then by place in the chunk.
template <class Settings>
struct KernelTraits : Settings {
  static constexpr int kWarps = Settings::kThreads / kWarp;
  static constexpr int kSection = Settings::kThreads * kVector;
  static constexpr int kCapacity = Settings::kChunks * kSection;
  static constexpr int kGroups = Settings::kChunks * kWarps;
  static constexpr int kCountsPerLane = (kGroups + kWarp - 1) / kWarp;

  static constexpr bool kHasWindow = Settings::kWindowSize > 1;
  static constexpr int kSlots = kHasWindow ? Settings::kWindowSize : 0;
  // Whether all entries of the window lie in shared memory at once, for one section.
  static constexpr int kWindowEntries = kSlots * Settings::kMaxKept;
  static constexpr bool kIsStaged = kHasWindow && Settings::kChunks == 1 && kWindowEntries <= kSection / 4;

  // Whether the weights are copied to shared memory while the threshold is found. It is too small for that beside a
  // window, and for fp32 it did not help.
  static constexpr bool kCopiesAhead =
      Settings::kAligned && Settings::kChunks == 1 && !kHasWindow && sizeof(typename Settings::Param) == 2;

  static constexpr bool kHasError = Settings::kLevels != 0;
  static constexpr bool kIsScaled = Settings::kLevels <= 3;   // a bucket stores a scale, else a range
  static constexpr bool kIsTernary = Settings::kLevels == 2;  // five codes are stored in a byte
  static constexpr int kCodeBits = Settings::kLevels == 1    ? 1
                                   : Settings::kLevels == 3  ? 2
                                   : Settings::kLevels == 15 ? 4
                                                             : 8;

  // Whether a bucket lies in the same chunk of one thread or of neighbouring threads of a warp.
  static constexpr bool kBucketsFitWarps = Settings::kBucketSize % kVector == 0 && Settings::kBucketSize <= kGroup &&
                                           (Settings::kBucketSize & (Settings::kBucketSize - 1)) == 0;
};

}  // namespace microadam
