// The counters from which the noise of stochastic rounding is made, see `microadam_dist/arithmetic/rounding.py`.
#pragma once

#include <stdint.h>

namespace microadam {
namespace {  // see floats.h

constexpr uint32_t kPositionFactor = 0xD0ACAD23u, kNoiseFactor = 0x725D39ADu;

inline uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x21F0AAADu;
  x = (x ^ x >> 15) * 0x735A2D97u;
  return x ^ x >> 15;
}

// Of the element at a position of its parameter.
inline uint32_t first_counter(int64_t position, int64_t step_key, int64_t shape_key) {
  return static_cast<uint32_t>(position) * kPositionFactor + mix(static_cast<uint32_t>(step_key ^ shape_key));
}

}  // namespace
}  // namespace microadam
