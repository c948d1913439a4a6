// Vectors of sixteen floats for AVX-512 with VBMI and VBMI2 (Ice Lake and later, Zen 4 and later). See simd_portable.h.
//
// Older CPUs with AVX-512 (Skylake-X, Cascade Lake) cannot compress or shift bytes, and take AVX2.
#pragma once

#include "simd_x86.h"

namespace microadam {
namespace {

typedef __m512 Floats;
typedef __m512i Ints;
typedef __mmask16 Lanes;
constexpr int kLanes = 16;

inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Ints splat(int32_t x) { return _mm512_set1_epi32(x); }

// ---- memory

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Ints load_ints(const uint32_t* from) { return _mm512_loadu_si512(from); }
inline Ints load_shorts(const uint16_t* from) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Floats load(const Bf16* from) { return _mm512_castsi512_ps(_mm512_slli_epi32(load_shorts(&from->bits), 16)); }
inline Floats load(const Fp16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// See vector_loops.h.
inline Floats load_first(const Bf16* from, int count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1u), from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store_ints(uint32_t* to, Ints x) { _mm512_storeu_si512(to, x); }
inline void store_shorts(uint16_t* to, Ints x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(x));
}

inline Ints bf16_bits(Ints x) {
  const Ints odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), splat(1));
  return _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(x, splat(0x7FFF)), odd), 16);
}

inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline void store(Bf16* to, Floats x) {
  const Lanes is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const Ints rounded = bf16_bits(_mm512_castps_si512(x));
  store_shorts(&to->bits, _mm512_mask_mov_epi32(rounded, is_nan, splat(0x7FC0)));
}
// Adds 16 bits of noise and cuts off as many.
inline void store_with_noise(Bf16* to, Floats x, Ints noise) {
  const Lanes is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const Ints rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(x), noise), 16);
  store_shorts(&to->bits, _mm512_mask_mov_epi32(rounded, is_nan, splat(0x7FC0)));
}
inline void store(Fp16* to, Floats x) {
  const __m256i rounded = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
}

inline void store_pairs(float* to, Floats even, Floats odd) {
  //   even  e0 e1 .. e15        odd  o0 o1 .. o15        first   e0 o0 e1 o1 .. e7  o7
  //          0  1 ..  15             16 17 ..  31        second  e8 o8 e9 o9 .. e15 o15
  const Ints first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const Ints second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(even, first, odd));
  _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(even, second, odd));
}

inline void load_pairs(const float* from, Floats* even, Floats* odd) {
  //   a     e0 o0 .. e7 o7      b    e8 o8 .. e15 o15    even    e0 e1 .. e15
  //          0  1 .. 14 15          16 17 ..  30  31     odd     o0 o1 .. o15
  const Floats a = load(from), b = load(from + 16);
  const Ints evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Ints odds = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  *even = _mm512_permutex2var_ps(a, evens, b);
  *odd = _mm512_permutex2var_ps(a, odds, b);
}

// ---- arithmetic

inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats square_root(Floats x) { return _mm512_sqrt_ps(x); }
inline void reduce_range(Floats low, Floats high, float* smallest, float* largest) {
  reduce_range(_mm256_min_ps(_mm512_castps512_ps256(low), _mm512_extractf32x8_ps(low, 1)),
               _mm256_max_ps(_mm512_castps512_ps256(high), _mm512_extractf32x8_ps(high, 1)), smallest, largest);
}

// ---- bits

inline Ints magnitude(Floats x) { return _mm512_and_si512(_mm512_castps_si512(x), splat(0x7FFFFFFF)); }
inline Ints max(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline int32_t reduce_max(Ints x) { return _mm512_reduce_max_epi32(x); }
inline int32_t reduce_add(Ints x) { return _mm512_reduce_add_epi32(x); }

// ---- integers, modulo 2**32

inline Ints lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints multiply(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Ints min_unsigned(Ints a, Ints b) { return _mm512_min_epu32(a, b); }
inline Ints exclusive_or(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
template <int count>
inline Ints shift_right(Ints x) {
  return _mm512_srli_epi32(x, count);
}

// ---- conditions

inline Lanes less(Ints a, Ints b) { return _mm512_cmplt_epi32_mask(a, b); }
inline Lanes equal(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask(a, b); }
inline Floats choose(Lanes where, Floats yes, Floats no) { return _mm512_mask_mov_ps(no, where, yes); }
inline uint32_t lane_bits(Lanes where) { return where; }
inline Ints count_at_least(Ints counts, Ints x, Ints threshold) {
  return _mm512_mask_sub_epi32(counts, _mm512_cmpge_epi32_mask(x, threshold), counts, splat(-1));
}

// ---- lists

// Compressing to a register: compressing to memory is microcoded on Zen 4.
inline int append(uint16_t* list, Ints x, uint32_t lanes) {
  const __m256i chosen = _mm256_maskz_compress_epi16(static_cast<__mmask16>(lanes), _mm512_cvtepi32_epi16(x));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(list), chosen);
  return _mm_popcnt_u32(lanes);
}

// Positions in a tile, one byte each.
inline __m512i tile_positions() {
  const __m512i quads = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
  return _mm512_add_epi8(_mm512_mullo_epi32(quads, splat(0x01010101)), splat(0x03020100));
}

inline int append_tile(uint16_t* list, int first, const Floats (&x)[4], Ints below) {
  uint64_t chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= static_cast<uint64_t>(less(below, magnitude(x[i]))) << (i * kLanes);
  const __m512i positions = _mm512_maskz_compress_epi8(chosen, tile_positions());
  const __m512i offset = _mm512_set1_epi16(static_cast<int16_t>(first));
  const __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(positions));
  _mm512_storeu_si512(list, _mm512_add_epi16(low, offset));
  const int count = static_cast<int>(_mm_popcnt_u64(chosen));
  if (count > 32) {
    const __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(positions, 1));
    _mm512_storeu_si512(list + 32, _mm512_add_epi16(high, offset));
  }
  return count;
}

// ---- codes, one a byte

inline Floats load_codes(const uint8_t* codes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
}

// 64 numbers to 64 clipped codes.
inline Ints rounded_64(const Floats (&x)[4], int levels) {
  const Ints a = _mm512_packs_epi32(_mm512_cvtps_epi32(x[0]), _mm512_cvtps_epi32(x[1]));
  const Ints b = _mm512_packs_epi32(_mm512_cvtps_epi32(x[2]), _mm512_cvtps_epi32(x[3]));
  // Packing works inside each quarter. In groups of four lanes, of which xij is number j of x[i]:
  //   packed   x00 x10 x20 x30 | x01 x11 x21 x31 | x02 x12 x22 x32 | x03 x13 x23 x33
  //   order      0   4   8  12 |   1   5   9  13 |   2   6  10  14 |   3   7  11  15
  //   bytes    x00 x01 x02 x03 | x10 x11 x12 x13 | x20 x21 x22 x23 | x30 x31 x32 x33
  const Ints order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const Ints bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(a, b));
  return _mm512_min_epu8(bytes, _mm512_set1_epi8(static_cast<int8_t>(levels)));
}

inline void round_64(uint8_t* codes, const Floats (&x)[4], int levels) {
  _mm512_storeu_si512(codes, rounded_64(x, levels));
}

// ---- 4-bit codes

struct Decoder {
  Floats levels;  // code * step + lo of all sixteen codes
};

inline Decoder make_decoder(float step, float lo) {
  const Floats codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_add_ps(_mm512_mul_ps(codes, splat(step)), splat(lo))};
}

inline void decode_64(const Decoder& decoder, const uint8_t* codes, Floats (&x)[4]) {
  // Lane i takes eight bits from bit 4 * i on; the permutation reads the low four of them only.
  //   sixteen_codes, in every eight bytes:   | code 15 |  ..  | code i + 1 | code i |  ..  | code 0 |
  //   lane i, its bytes from the last one:   |  ..  |  ..  |  ..  | code i + 1, code i |
  const Ints first_bit = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
  for (int i = 0; i < 4; ++i) {
    int64_t sixteen_codes;
    memcpy(&sixteen_codes, codes + 8 * i, 8);
    const Ints indices = _mm512_multishift_epi64_epi8(first_bit, _mm512_set1_epi64(sixteen_codes));
    x[i] = _mm512_permutexvar_ps(indices, decoder.levels);
  }
}

inline void encode_64(uint8_t* codes, const Floats (&x)[4]) {
  const Ints pairs = _mm512_maddubs_epi16(rounded_64(x, 15), _mm512_set1_epi16(0x1001));  // first + 16 * second
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm512_cvtepi16_epi8(pairs));
}

}  // namespace
}  // namespace microadam
