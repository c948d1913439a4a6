// How new weights are rounded to their dtype: to nearest, or bf16 stochastically. Needs a simd_*.h before it.
#pragma once

#include "counters.h"
#include "vector_loops.h"

namespace microadam {
namespace {

// Whether a weight times `decay` rounds to the weight itself, whatever the weight: with b significant bits its
// neighbours are at least 2**-b times itself away, so a change of 2**-(b+2) times itself is far from half way to them.
inline bool rounds_away(const float*, float decay) { return decay == 1.f; }
inline bool rounds_away(const Bf16*, float decay) { return decay <= 1.f && 1.f - decay <= 0x1p-10f; }
inline bool rounds_away(const Fp16*, float decay) { return decay <= 1.f && 1.f - decay <= 0x1p-13f; }

// At most what multiplying by `decay` takes off the bits of a weight. They count steps of at least 2**-24 times the
// weight before it; one more is for the rounding, another one for that of this product.
inline int32_t largest_loss(float decay) {
  const float loss = (1.f - decay) * 0x1.02p24f + 2.f;
  return loss < 0x1p16f ? static_cast<int32_t>(loss) : 0x10000;
}

struct Nearest {
  // p = p * decay
  template <class Param>
  void decay(Param* param, int numel, float factor) const {
    const Floats decay = splat(factor);
    if (!rounds_away(param, factor)) transform(param, param, numel, [=](Floats w) { return w * decay; });
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

  // Noise that is not smaller than what a weight loses makes up for it. A factor near 1 changes so few weights that
  // most vectors are known by their noise to stay as they are; where more change, looking would only mislead the CPU.
  void decay(Bf16* param, int numel, float factor) const {
    if (factor == 1.f) return;
    constexpr int kVectors = 4;
    const Floats decay = splat(factor);
    const int32_t largest = largest_loss(factor);
    const bool changes_few = largest < 0x200;
    const Ints loss = splat(largest), stride = counters_of(splat(kLanes));
    Ints counters = counters_;
    int i = 0;
    for (; i + kVectors * kLanes <= numel; i += kVectors * kLanes) {
      Ints mixed[kVectors];
      Ints smallest = splat(-1);
      for (Ints& x : mixed) {
        x = mix_counters(counters);
        smallest = min_unsigned(smallest, x);
        counters = add(counters, stride);
      }
      if (changes_few && lane_bits(less(shift_right<16>(smallest), loss)) == 0) continue;
      for (int k = 0; k < kVectors; ++k) {
        Bf16* const to = param + i + k * kLanes;
        store_with_noise(to, load(to) * decay, shift_right<16>(mixed[k]));
      }
    }
    for (; i < numel; i += kLanes) {
      const int count = numel - i;
      Bf16 rest[kLanes];
      store_from(i, rest, (count < kLanes ? load_first(param + i, count) : load(param + i)) * decay);
      memcpy(param + i, rest, static_cast<size_t>(count < kLanes ? count : kLanes) * sizeof(Bf16));
    }
  }

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

  // The noise is the upper half.
  static Ints mix_counters(Ints counters) {
    const Ints mixed = exclusive_or(counters, shift_right<11>(counters));
    return multiply(mixed, splat(static_cast<int32_t>(kNoiseFactor)));
  }
  static Ints noise(Ints counters) { return shift_right<16>(mix_counters(counters)); }

  uint32_t counter_;
  Ints counters_;  // of the first kLanes elements
};

}  // namespace
}  // namespace microadam
