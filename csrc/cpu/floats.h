// 16-bit floating point numbers as they lie in memory, and their conversion one at a time.
#pragma once

#include <stdint.h>
#include <string.h>

namespace microadam {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// Every header that the instruction-set files include keeps its code in an unnamed namespace: a function compiled with
// AVX-512 must never be the copy that the linker keeps for the others. For the same reason they use no std templates.
namespace {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

constexpr uint32_t kSignBit = 0x80000000u;
constexpr uint32_t kInfBits = 0x7F800000u;

// Bits of the bf16 nearest to a number that is not NaN, ties to even. Magnitudes keep their order.
inline uint32_t bf16_bits(uint32_t fp32_bits) { return (fp32_bits + 0x7FFFu + ((fp32_bits >> 16) & 1u)) >> 16; }

// Bits of the smallest fp32 magnitude that rounds to the bf16 magnitude `key` or a larger one.
inline uint32_t smallest_with_key(uint32_t key) { return key == 0 ? 0 : (key << 16) - 0x8000u + (key & 1u); }

inline float to_float(float x) { return x; }

inline float to_float(Bf16 x) { return float_from_bits(uint32_t{x.bits} << 16); }

inline float to_float(Fp16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_from_bits(sign | kInfBits | (magnitude & 0x3FFu) << 13);
  if (magnitude < 0x400u) return float_from_bits(sign | float_bits(static_cast<float>(magnitude) * 0x1p-24f));
  return float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
}

inline void round_to(float* out, float x) { *out = x; }

inline void round_to(Bf16* out, float x) {
  const uint32_t bits = float_bits(x);
  const bool is_nan = (bits & ~kSignBit) > kInfBits;
  out->bits = static_cast<uint16_t>(is_nan ? 0x7FC0u : bf16_bits(bits));
}

inline void round_to(Fp16* out, float x) {
  const uint32_t sign = (float_bits(x) & kSignBit) >> 16;
  uint32_t magnitude = float_bits(x) & ~kSignBit;
  if (magnitude > kInfBits) {
    magnitude = 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {  // 65520 and above round to Inf
    magnitude = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the sum's last bit is worth 2**-24, as that of a subnormal fp16
    magnitude = float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f);
  } else {
    magnitude = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | magnitude);
}

}  // namespace
}  // namespace microadam
