// Vectors of four floats for any CPU, through the vector extension of GCC and Clang (SSE2, NEON, ...).
//
// The simd_*.h headers offer the same names; the kernel is written in them alone. `Floats` and `Ints` are vectors of
// kLanes elements on which + - * / & work, all of them rounded as IEEE 754 says.
#pragma once

#include <math.h>

#include "floats.h"

namespace microadam {
namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef Ints Lanes;  // a condition for each lane: all bits set or none
constexpr int kLanes = 4;

inline Floats splat(float x) { return Floats{x, x, x, x}; }
inline Ints splat(int32_t x) { return Ints{x, x, x, x}; }

// ---- memory; addresses need no alignment beyond that of the element

template <class T>
inline Floats load(const T* from) {
  Floats x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(from[i]);
  return x;
}

template <class T>
inline void store(T* to, Floats x) {
  for (int i = 0; i < kLanes; ++i) round_to(to + i, x[i]);
}

// Adds 16 bits of noise and cuts off as many.
inline void store_with_noise(Bf16* to, Floats x, Ints noise) {
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t bits = float_bits(x[i]) + static_cast<uint32_t>(noise[i]);
    to[i].bits = x[i] == x[i] ? static_cast<uint16_t>(bits >> 16) : uint16_t{0x7FC0};
  }
}

inline Ints load_ints(const uint32_t* from) {
  Ints x;
  memcpy(&x, from, sizeof x);
  return x;
}

inline Ints load_shorts(const uint16_t* from) { return Ints{from[0], from[1], from[2], from[3]}; }

inline void store_ints(uint32_t* to, Ints x) { memcpy(to, &x, sizeof x); }

// kLanes pairs (even, odd), one after the other.
inline void store_pairs(float* to, Floats even, Floats odd) {
  for (int i = 0; i < kLanes; ++i) {
    to[2 * i] = even[i];
    to[2 * i + 1] = odd[i];
  }
}

inline void load_pairs(const float* from, Floats* even, Floats* odd) {
  for (int i = 0; i < kLanes; ++i) {
    (*even)[i] = from[2 * i];
    (*odd)[i] = from[2 * i + 1];
  }
}

// ---- arithmetic

inline Floats min(Floats a, Floats b) { return a < b ? a : b; }
inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

inline Floats square_root(Floats x) {
  for (int i = 0; i < kLanes; ++i) x[i] = sqrtf(x[i]);
  return x;
}

// The smallest lane of `low` and the largest of `high`.
inline void reduce_range(Floats low, Floats high, float* smallest, float* largest) {
  float a = low[0], b = high[0];
  for (int i = 1; i < kLanes; ++i) {
    a = low[i] < a ? low[i] : a;
    b = high[i] > b ? high[i] : b;
  }
  *smallest = a;
  *largest = b;
}

// ---- bits of floats; magnitudes are bits without the sign, so they compare like signed integers

inline Ints magnitude(Floats x) { return (Ints)x & 0x7FFFFFFF; }
inline Ints max(Ints a, Ints b) { return a > b ? a : b; }
inline int32_t reduce_max(Ints x) {
  const int32_t a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
inline int32_t reduce_add(Ints x) { return x[0] + x[1] + x[2] + x[3]; }

typedef uint32_t Unsigned __attribute__((vector_size(16)));

// Bits of fp32 numbers, none of them NaN -> bits of the nearest bf16.
inline Ints bf16_bits(Ints x) {
  const Unsigned bits = (Unsigned)x;
  return (Ints)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// ---- integers, modulo 2**32

inline Ints lane_numbers() { return Ints{0, 1, 2, 3}; }
inline Ints add(Ints a, Ints b) { return (Ints)((Unsigned)a + (Unsigned)b); }
inline Ints multiply(Ints a, Ints b) { return (Ints)((Unsigned)a * (Unsigned)b); }
inline Ints min_unsigned(Ints a, Ints b) { return (Unsigned)a < (Unsigned)b ? a : b; }
inline Ints exclusive_or(Ints a, Ints b) { return a ^ b; }
template <int count>
inline Ints shift_right(Ints x) {
  return (Ints)((Unsigned)x >> count);
}

// ---- conditions

inline Lanes less(Ints a, Ints b) { return a < b; }
inline Lanes equal(Ints a, Ints b) { return a == b; }
inline Floats choose(Lanes where, Floats yes, Floats no) { return where ? yes : no; }

// One bit a lane.
inline uint32_t lane_bits(Lanes where) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (where[i] & 1u) << i;
  return bits;
}

// counts + 1 in every lane where x >= threshold.
inline Ints count_at_least(Ints counts, Ints x, Ints threshold) { return counts - (x >= threshold); }

// ---- lists; what follows the last element is overwritten (see kPad)

// Appends first + i for every element i of a tile whose magnitude is above `below`. Returns the number appended.
inline int append_tile(uint16_t* list, int first, const Floats (&x)[64 / kLanes], Ints below) {
  int count = 0;
  for (int i = 0; i < 64 / kLanes; ++i) {
    const Lanes chosen = less(below, magnitude(x[i]));
    for (int j = 0; j < kLanes; ++j) {
      list[count] = static_cast<uint16_t>(first + i * kLanes + j);
      count += chosen[j] & 1;
    }
  }
  return count;
}

// Appends the low 16 bits of x in every lane whose bit is set. Returns the number appended.
inline int append(uint16_t* list, Ints x, uint32_t lanes) {
  int count = 0;
  for (int i = 0; i < kLanes; ++i) {
    list[count] = static_cast<uint16_t>(x[i]);
    count += static_cast<int>(lanes >> i & 1u);
  }
  return count;
}

// The first `count` set bits.
inline uint32_t first_bits(uint32_t bits, int count) {
  uint32_t first = 0;
  for (; bits != 0 && count > 0; bits &= bits - 1, --count) first |= bits & -bits;
  return first;
}

// ---- codes, one a byte

// kLanes of them.
inline Floats load_codes(const uint8_t* codes) {
  Floats x;
  for (int i = 0; i < kLanes; ++i) x[i] = codes[i];
  return x;
}

// Rounds 64 numbers to the nearest integer, ties to even, and clips them to 0..levels.
inline void round_64(uint8_t* codes, const Floats (&x)[64 / kLanes], int levels) {
  // Clipping first gives the same, and adding 1.5 * 2**23 then leaves the rounded integer in the low bits.
  for (int i = 0; i < 64 / kLanes; ++i) {
    const Floats clipped = min(max(x[i], splat(0.f)), splat(static_cast<float>(levels)));
    const Ints bits = (Ints)(clipped + splat(12582912.f));
    for (int j = 0; j < kLanes; ++j) codes[i * kLanes + j] = static_cast<uint8_t>(bits[j]);
  }
}

// ---- 4-bit codes, two a byte, the first in the low bits

struct Decoder {
  Floats step, lo;
};

inline Decoder make_decoder(float step, float lo) { return {splat(step), splat(lo)}; }

// code * step + lo of 64 codes.
inline void decode_64(const Decoder& decoder, const uint8_t* codes, Floats (&x)[64 / kLanes]) {
  for (int i = 0; i < 64 / kLanes; ++i, codes += 2) {
    const Floats unpacked = {static_cast<float>(codes[0] & 15), static_cast<float>(codes[0] >> 4),
                             static_cast<float>(codes[1] & 15), static_cast<float>(codes[1] >> 4)};
    x[i] = unpacked * decoder.step + decoder.lo;
  }
}

// Rounds 64 numbers as round_64 does, to 0..15, and packs them into 32 bytes.
inline void encode_64(uint8_t* codes, const Floats (&x)[64 / kLanes]) {
  alignas(16) uint8_t unpacked[64];
  round_64(unpacked, x, 15);
  for (int i = 0; i < 32; ++i) codes[i] = static_cast<uint8_t>(unpacked[2 * i] | unpacked[2 * i + 1] << 4);
}

}  // namespace
}  // namespace microadam
