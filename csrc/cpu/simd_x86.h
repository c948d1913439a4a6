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

// The smallest lane of `low` and the largest of `high`, as the smallest of -high: one reduction for both.
inline void reduce_range(__m256 low, __m256 high, float* smallest, float* largest) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  const __m256 negative = _mm256_xor_ps(high, sign);
  //   low    l0 l1 l2 l3 | l4 l5 l6 l7        negative   n0 n1 n2 n3 | n4 n5 n6 n7
  //   0x20   l0 l1 l2 l3 | n0 n1 n2 n3        0x31       l4 l5 l6 l7 | n4 n5 n6 n7
  //   inside each half, 0x4E takes lanes 2 3 0 1 and 0xB1 takes lanes 1 0 3 2
  __m256 x = _mm256_min_ps(_mm256_permute2f128_ps(low, negative, 0x20), _mm256_permute2f128_ps(low, negative, 0x31));
  x = _mm256_min_ps(x, _mm256_permute_ps(x, 0x4E));
  x = _mm256_min_ps(x, _mm256_permute_ps(x, 0xB1));
  x = _mm256_xor_ps(x, _mm256_setr_ps(0.f, 0.f, 0.f, 0.f, -0.f, -0.f, -0.f, -0.f));
  _mm_store_ss(smallest, _mm256_castps256_ps128(x));
  _mm_store_ss(largest, _mm256_extractf128_ps(x, 1));
}

}  // namespace
}  // namespace microadam
