// What simd_avx2.h and simd_avx512.h have in common.
#pragma once

#include <immintrin.h>

#include "floats.h"

namespace microadam {
namespace {

// The first `count` set bits.
inline uint32_t first_bits(uint32_t bits, int count) {
  return count >= 32 ? bits : _pdep_u32((1u << count) - 1u, bits);
}

}  // namespace
}  // namespace microadam
