// Vectors of eight floats for AVX2 with F16C, BMI2 and POPCNT (Haswell and later, Zen and later). See simd_portable.h.
#pragma once

#include "simd_x86.h"

namespace microadam {
namespace {

typedef __m256 Floats;
typedef __m256i Ints;
typedef __m256 Lanes;
constexpr int kLanes = 8;

inline Floats splat(float x) { return _mm256_set1_ps(x); }
inline Ints splat(int32_t x) { return _mm256_set1_epi32(x); }

// ---- memory

inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline Ints load_ints(const uint32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline Ints load_shorts(const uint16_t* from) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Floats load(const Bf16* from) { return _mm256_castsi256_ps(_mm256_slli_epi32(load_shorts(&from->bits), 16)); }
inline Floats load(const Fp16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

inline void store_ints(uint32_t* to, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
// The lanes must be below 2**16.
inline void store_shorts(uint16_t* to, Ints x) {
  const __m128i shorts = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), shorts);
}

inline Ints bf16_bits(Ints x) {
  const Ints odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), splat(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(x, splat(0x7FFF)), odd), 16);
}

inline void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
inline void store(Bf16* to, Floats x) {
  const Ints is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const Ints rounded = bf16_bits(_mm256_castps_si256(x));
  store_shorts(&to->bits, _mm256_blendv_epi8(rounded, splat(0x7FC0), is_nan));
}
// Adds 16 bits of noise and cuts off as many.
inline void store_with_noise(Bf16* to, Floats x, Ints noise) {
  const Ints is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const Ints rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(x), noise), 16);
  store_shorts(&to->bits, _mm256_blendv_epi8(rounded, splat(0x7FC0), is_nan));
}
inline void store(Fp16* to, Floats x) {
  const __m128i rounded = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), rounded);
}

inline void store_pairs(float* to, Floats even, Floats odd) {
  // Unpacking works inside each half:
  //   low    e0 o0 e1 o1 | e4 o4 e5 o5        high   e2 o2 e3 o3 | e6 o6 e7 o7
  //   0x20, the first halves: e0 o0 e1 o1 | e2 o2 e3 o3;  0x31, the second ones: e4 o4 e5 o5 | e6 o6 e7 o7
  const Floats low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  _mm256_storeu_ps(to, _mm256_permute2f128_ps(low, high, 0x20));
  _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(low, high, 0x31));
}

inline void load_pairs(const float* from, Floats* even, Floats* odd) {
  //   a      e0 o0 e1 o1 | e2 o2 e3 o3        b      e4 o4 e5 o5 | e6 o6 e7 o7
  //   low    e0 o0 e1 o1 | e4 o4 e5 o5        high   e2 o2 e3 o3 | e6 o6 e7 o7    (0x20, 0x31: as in store_pairs)
  //   0x88, lanes 0 and 2 of each half of both: e0 e1 e2 e3 | e4 e5 e6 e7;  0xDD, lanes 1 and 3: o0 .. o3 | o4 .. o7
  const Floats a = load(from), b = load(from + 8);
  const Floats low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
  *even = _mm256_shuffle_ps(low, high, 0x88);
  *odd = _mm256_shuffle_ps(low, high, 0xDD);
}

// ---- arithmetic

inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats square_root(Floats x) { return _mm256_sqrt_ps(x); }

// ---- bits

inline Ints magnitude(Floats x) { return _mm256_and_si256(_mm256_castps_si256(x), splat(0x7FFFFFFF)); }
inline Ints max(Ints a, Ints b) { return _mm256_max_epi32(a, b); }

inline int32_t reduce_max(Ints x) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  half = _mm_max_epi32(half, _mm_unpackhi_epi64(half, half));
  return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 1)));
}

inline int32_t reduce_add(Ints x) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  half = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 1)));
}

// ---- integers, modulo 2**32

inline Ints lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints multiply(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
inline Ints min_unsigned(Ints a, Ints b) { return _mm256_min_epu32(a, b); }
inline Ints exclusive_or(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
template <int count>
inline Ints shift_right(Ints x) {
  return _mm256_srli_epi32(x, count);
}

// ---- conditions

inline Lanes less(Ints a, Ints b) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(b, a)); }
inline Lanes equal(Ints a, Ints b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
inline Floats choose(Lanes where, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, where); }
inline uint32_t lane_bits(Lanes where) { return static_cast<uint32_t>(_mm256_movemask_ps(where)); }
inline Ints count_at_least(Ints counts, Ints x, Ints threshold) {
  // 1 for every lane, taken back where the threshold is larger.
  return _mm256_add_epi32(_mm256_add_epi32(counts, splat(1)), _mm256_cmpgt_epi32(threshold, x));
}

// ---- lists

// For every byte the positions of its set bits, one byte each.
struct SetBits {
  uint64_t of[256] = {};
  constexpr SetBits() {
    for (int byte = 0; byte < 256; ++byte) {
      int shift = 0;
      for (int bit = 0; bit < 8; ++bit) {
        if (byte >> bit & 1) {
          of[byte] |= static_cast<uint64_t>(bit) << shift;
          shift += 8;
        }
      }
    }
  }
};
constexpr SetBits kSetBits;

inline int append(uint16_t* list, Ints x, uint32_t lanes) {
  //   lanes = 0b10010010     order  1  4  7  0  0  0  0  0
  //                          list   x1 x4 x7, and what the next call overwrites
  const Ints order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kSetBits.of[lanes])));
  store_shorts(list, _mm256_permutevar8x32_epi32(x, order));
  return _mm_popcnt_u32(lanes);
}

inline int append_tile(uint16_t* list, int first, const Floats (&x)[8], Ints below) {
  int count = 0;
  for (int i = 0; i < 8; ++i) {
    const uint32_t lanes = lane_bits(less(below, magnitude(x[i])));
    const __m128i positions = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(static_cast<int64_t>(kSetBits.of[lanes])));
    const __m128i shorts = _mm_add_epi16(_mm_set1_epi16(static_cast<int16_t>(first + i * kLanes)), positions);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(list + count), shorts);
    count += _mm_popcnt_u32(lanes);
  }
  return count;
}

// ---- codes, one a byte

inline Floats load_codes(const uint8_t* codes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
}

// 32 numbers to 32 clipped codes, one byte each.
inline Ints round_32(const Floats* x, int levels) {
  const Ints a = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]));
  const Ints b = _mm256_packs_epi32(_mm256_cvtps_epi32(x[2]), _mm256_cvtps_epi32(x[3]));
  // Packing works inside each half. In groups of four lanes, xi for the first ones of x[i] and Xi for the last ones:
  //   packed   x0 x1 x2 x3 | X0 X1 X2 X3
  //   order     0  4  1  5 |  2  6  3  7
  //   bytes    x0 X0 x1 X1 | x2 X2 x3 X3
  const Ints order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const Ints bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), order);
  return _mm256_min_epu8(bytes, _mm256_set1_epi8(static_cast<int8_t>(levels)));
}

inline void round_64(uint8_t* codes, const Floats (&x)[8], int levels) {
  store_ints(reinterpret_cast<uint32_t*>(codes), round_32(x, levels));
  store_ints(reinterpret_cast<uint32_t*>(codes + 32), round_32(x + 4, levels));
}

// ---- 4-bit codes

struct Decoder {
  Floats step, lo;
};

inline Decoder make_decoder(float step, float lo) { return {splat(step), splat(lo)}; }

inline void decode_64(const Decoder& decoder, const uint8_t* codes, Floats (&x)[8]) {
  const Ints shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  for (int i = 0; i < 8; ++i) {
    int32_t eight_codes;
    memcpy(&eight_codes, codes + 4 * i, 4);
    const Ints unpacked = _mm256_and_si256(_mm256_srlv_epi32(splat(eight_codes), shifts), splat(15));
    x[i] = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(unpacked), decoder.step), decoder.lo);
  }
}

inline void encode_64(uint8_t* codes, const Floats (&x)[8]) {
  const Ints weights = _mm256_set1_epi16(0x1001);  // first + 16 * second
  const Ints a = _mm256_maddubs_epi16(round_32(x, 15), weights);
  const Ints b = _mm256_maddubs_epi16(round_32(x + 4, 15), weights);
  // The same for groups of eight lanes:
  //   packed   a0 b0 | a1 b1
  //   0xD8      0  2 |  1  3
  //   bytes    a0 a1 | b0 b1
  const Ints bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xD8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), bytes);
}

}  // namespace
}  // namespace microadam
