// How new weights are rounded to their dtype: to nearest, or bf16 stochastically. Needs a simd_*.h before it.
#pragma once

#include "counters.h"
#include "vector_loops.h"

namespace microadam {
namespace {

// Whether a weight times `decay` rounds to the weight itself, whatever the weight: with b significant bits its
// neighbours are at least 2**-b times itself away, so a change of 2**-(b+2) times itself is far from half way to them.
inline bool rounds_away(const Bf16*, float decay) { return decay <= 1.f && 1.f - decay <= 0x1p-10f; }
inline bool rounds_away(const Fp16*, float decay) { return decay <= 1.f && 1.f - decay <= 0x1p-13f; }

struct Nearest {
  template <class Param>
  bool keeps_all(const Param* param, float decay) const {
    return rounds_away(param, decay);
  }
  // Some elements of a block or piece: those from number `first` on.
  template <class Param>
  void store_from(int /*first*/, Param* to, Floats x) const {
    store(to, x);
  }
  // Those whose numbers are listed; `count` numbers may be read.
  template <class Param>
  void store_listed(const uint16_t* /*elements*/, int /*count*/, Param* to, Floats x) const {
    store(to, x);
  }
};

class Stochastic {
 public:
  // `counter`: of the first element.
  explicit Stochastic(uint32_t counter)
      : counter_(counter), counters_(add(counters_of(lane_numbers()), splat(static_cast<int32_t>(counter)))) {}

  bool keeps_all(const Bf16*, float decay) const { return decay == 1.f; }

  void store_from(int first, Bf16* to, Floats x) const {
    const uint32_t passed = static_cast<uint32_t>(first) * kPositionFactor;
    store_with_noise(to, x, noise(add(counters_, splat(static_cast<int32_t>(passed)))));
  }

  void store_listed(const uint16_t* elements, int count, Bf16* to, Floats x) const {
    uint16_t padded[kLanes] = {};
    if (count < kLanes) elements = static_cast<uint16_t*>(memcpy(padded, elements, count * sizeof(uint16_t)));
    const Ints counters = add(counters_of(load_shorts(elements)), splat(static_cast<int32_t>(counter_)));
    store_with_noise(to, x, noise(counters));
  }

 private:
  static Ints counters_of(Ints elements) { return multiply(elements, splat(static_cast<int32_t>(kPositionFactor))); }

  static Ints noise(Ints counters) {
    const Ints mixed = exclusive_or(counters, shift_right<11>(counters));
    return shift_right<16>(multiply(mixed, splat(static_cast<int32_t>(kNoiseFactor))));
  }

  uint32_t counter_;
  Ints counters_;  // of the first kLanes elements
};

}  // namespace
}  // namespace microadam
