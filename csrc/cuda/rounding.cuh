// Stochastic rounding of bf16 weights, see `microadam_dist/arithmetic/rounding.py`: noise is added to the fp32 bits,
// and the lower half cut off.
#pragma once

#include "vectors.cuh"

namespace microadam {

constexpr uint32 kPositionFactor = 0xd0acad23u, kNoiseFactor = 0x725d39adu;

__device__ __forceinline__ uint32 mix(uint32 x) {
  x = (x ^ x >> 16) * 0x21f0aaadu;
  x = (x ^ x >> 15) * 0x735a2d97u;
  return x ^ x >> 15;
}

// The rounded number is the upper half.
__device__ __forceinline__ uint32 with_noise(float x, uint32 counter) {
  const uint32 noise = (counter ^ counter >> 11) * kNoiseFactor >> 16;
  // A NaN is 0x7fffffff here, and must not wrap around.
  return static_cast<uint32>(min(static_cast<int32>(float_bits(x)), 0x7fff0000)) + noise;
}

__device__ __forceinline__ void round_to(Bf16* p, float x, uint32 counter) {
  p->bits = static_cast<uint16>(with_noise(x, counter) >> 16);
}

// As store_first in vectors.cuh, from the counter of the first number.
template <bool kAligned>
__device__ __forceinline__ void store_first(Bf16* p, const float (&x)[kVector], int count, uint32 counter) {
  if constexpr (kAligned) {
    uint32 pairs[kVector / 2];
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const uint32 low = with_noise(x[2 * i], counter + 2 * i * kPositionFactor);
      const uint32 high = with_noise(x[2 * i + 1], counter + (2 * i + 1) * kPositionFactor);
      pairs[i] = __byte_perm(low, high, 0x7632);
    }
    store_pairs(p, pairs);
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (j < count) round_to(p + j, x[j], counter + j * kPositionFactor);
    }
  }
}

}  // namespace microadam
