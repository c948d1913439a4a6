// Error-feedback codes with one byte each, and how they are stored: 8, 2 or 1 bits, the first in the low bits, or five
// of three levels in a byte. Those of 4 bits are not unpacked, see simd_*.h.
#pragma once

#include <string.h>

#include "kernel.h"

namespace microadam {
namespace {

constexpr int kTernaryLevels = 2;
constexpr int kTernaryGroup = 512, kTernaryDigits = 5;

// Three-level codes that are packed together: digit d of byte i is the code of element d * width + i, see
// `ternary_groups` in microadam_dist/layout/state.py.
struct TernaryGroup {
  int numel, width;

  int members(int digit) const {
    const int rest = numel - digit * width;
    return rest < 0 ? 0 : rest < width ? rest : width;
  }
};

inline TernaryGroup ternary_group(int numel) {
  const int members = numel < kTernaryGroup ? numel : kTernaryGroup;
  return {members, 8 * ((members + 8 * kTernaryDigits - 1) / (8 * kTernaryDigits))};
}

inline void unpack_ternary(const uint8_t* packed, int numel, uint8_t* codes) {
  for (; numel > 0; numel -= kTernaryGroup, codes += kTernaryGroup) {
    const TernaryGroup group = ternary_group(numel);
    uint8_t rest[kTernaryGroup / 4];
    memcpy(rest, packed, static_cast<size_t>(group.width));
    for (int digit = 0; digit < kTernaryDigits; ++digit) {
      uint8_t* const members = codes + digit * group.width;
      const int count = group.members(digit);
      for (int i = 0; i < count; ++i) {
        const uint8_t third = static_cast<uint8_t>(rest[i] * 171u >> 9);  // of any byte
        members[i] = static_cast<uint8_t>(rest[i] - 3 * third);
        rest[i] = third;
      }
    }
    packed += group.width;
  }
}

inline void pack_ternary(const uint8_t* codes, int numel, uint8_t* packed) {
  for (; numel > 0; numel -= kTernaryGroup, codes += kTernaryGroup) {
    const TernaryGroup group = ternary_group(numel);
    uint8_t sums[kTernaryGroup / 4] = {};
    for (int digit = kTernaryDigits - 1; digit >= 0; --digit) {
      const uint8_t* const members = codes + digit * group.width;
      const int count = group.members(digit);
      for (int i = 0; i < group.width; ++i) sums[i] = static_cast<uint8_t>(3 * sums[i]);
      for (int i = 0; i < count; ++i) sums[i] = static_cast<uint8_t>(sums[i] + members[i]);
    }
    memcpy(packed, sums, static_cast<size_t>(group.width));
    packed += group.width;
  }
}

// Four codes of 2 bits in a byte, or of 1 bit in half of one, to one byte each, and back.
inline uint32_t spread_2_bits(uint32_t x) {
  x = (x | x << 12) & 0x000F000Fu;
  return (x | x << 6) & 0x03030303u;
}
inline uint32_t gather_2_bits(uint32_t x) {
  x = (x | x >> 6) & 0x000F000Fu;
  return (x | x >> 12) & 0xFFu;
}
inline uint32_t spread_1_bit(uint32_t x) { return ((x & 15u) * 0x00204081u) & 0x01010101u; }
inline uint32_t gather_1_bit(uint32_t x) { return (x | x >> 7 | x >> 14 | x >> 21) & 15u; }

// To `codes`, which is a scratch buffer: what follows the last one is overwritten.
inline void unpack_codes(const uint8_t* packed, int numel, int levels, uint8_t* codes) {
  if (levels == 255) {
    memcpy(codes, packed, static_cast<size_t>(numel));
  } else if (levels == 3) {
    for (int i = 0; i < (numel + 3) / 4; ++i) {
      const uint32_t four = spread_2_bits(packed[i]);
      memcpy(codes + 4 * i, &four, sizeof four);
    }
  } else if (levels == 1) {
    for (int i = 0; i < (numel + 7) / 8; ++i) {
      const uint32_t eight[] = {spread_1_bit(packed[i]), spread_1_bit(packed[i] >> 4)};
      memcpy(codes + 8 * i, eight, sizeof eight);
    }
  } else {
    unpack_ternary(packed, numel, codes);
  }
}

// From such a buffer; the codes that follow the last one become zeros.
inline void pack_codes(uint8_t* codes, int numel, int levels, uint8_t* packed) {
  memset(codes + numel, 0, 8);
  if (levels == 255) {
    memcpy(packed, codes, static_cast<size_t>(numel));
  } else if (levels == 3) {
    for (int i = 0; i < (numel + 3) / 4; ++i) {
      uint32_t four;
      memcpy(&four, codes + 4 * i, sizeof four);
      packed[i] = static_cast<uint8_t>(gather_2_bits(four));
    }
  } else if (levels == 1) {
    for (int i = 0; i < (numel + 7) / 8; ++i) {
      uint32_t eight[2];
      memcpy(eight, codes + 8 * i, sizeof eight);
      packed[i] = static_cast<uint8_t>(gather_1_bit(eight[0]) | gather_1_bit(eight[1]) << 4);
    }
  } else {
    pack_ternary(codes, numel, packed);
  }
}

}  // namespace
}  // namespace microadam
