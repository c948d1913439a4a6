// Error-feedback codes: sixteen of a thread in registers, and how they are stored.
#pragma once

#include "block.cuh"

namespace microadam {

// Sixteen codes of kBits each, the first in the lowest bits; those of three levels have a byte here.
template <int kBits>
struct Codes {
  static constexpr int kBytes = kVector * kBits / 8;
  uint32 words[(kBytes + 3) / 4];
};

// Code number j as a float, plus 2^23, the bits of which are `power`: those of the code become the last ones.
template <int kBits>
__device__ __forceinline__ float number_of(const Codes<kBits>& codes, int j, uint32 power) {
  constexpr uint32 kMask = kBits == 8 ? 0xffffffffu : ((1u << kBits) - 1) * 0x01010101u;
  const int bit = j * kBits % 32;
  const uint32 one_a_byte = (codes.words[j * kBits / 32] >> bit % 8) & kMask;
  //   byte           7     6     5     4        3        2        1        0
  //   power       |  4b |  00 |  00 |  00 |
  //   one_a_byte                          |  code 6 | code 4 | code 2 | code 0 |  of 4 bits, for even j
  //   0x744i, i = bit / 8, takes byte          7        4        4        i
  //   number                              |    4b   |   00   |   00   | code j |
  return as_float(__byte_perm(one_a_byte, power, 0x7440 | bit / 8));
}

// ---- 1, 2, 4 and 8 bits

template <bool kAligned, int kBits>
__device__ __forceinline__ void load_codes(Codes<kBits>& codes, const uint8* p, int count) {
  codes = {};
  if constexpr (!kAligned) {
#pragma unroll
    for (int i = 0; i < Codes<kBits>::kBytes; ++i) {
      if (i * 8 / kBits < count) codes.words[i / 4] |= static_cast<uint32>(p[i]) << (8 * (i % 4));
    }
  } else if (count > 0) {
    if constexpr (kBits == 8) {
      const uint4 words = *reinterpret_cast<const uint4*>(p);
      for (int i = 0; i < 4; ++i) codes.words[i] = word(words, i);
    } else if constexpr (kBits == 4) {
      const uint2 words = *reinterpret_cast<const uint2*>(p);
      codes.words[0] = words.x;
      codes.words[1] = words.y;
    } else if constexpr (kBits == 2) {
      codes.words[0] = *reinterpret_cast<const uint32*>(p);
    } else {
      codes.words[0] = *reinterpret_cast<const uint16*>(p);
    }
  }
}

// Codes beyond `count` are zeros.
template <bool kAligned, int kBits>
__device__ __forceinline__ void store_codes(uint8* p, const Codes<kBits>& codes, int count) {
  if constexpr (!kAligned) {
#pragma unroll
    for (int i = 0; i < Codes<kBits>::kBytes; ++i) {
      if (i * 8 / kBits < count) p[i] = static_cast<uint8>(codes.words[i / 4] >> (8 * (i % 4)));
    }
  } else if (count > 0) {
    if constexpr (kBits == 8) {
      *reinterpret_cast<uint4*>(p) = make_uint4(codes.words[0], codes.words[1], codes.words[2], codes.words[3]);
    } else if constexpr (kBits == 4) {
      *reinterpret_cast<uint2*>(p) = make_uint2(codes.words[0], codes.words[1]);
    } else if constexpr (kBits == 2) {
      *reinterpret_cast<uint32*>(p) = codes.words[0];
    } else {
      *reinterpret_cast<uint16*>(p) = static_cast<uint16>(codes.words[0]);
    }
  }
}

// ---- three levels, five codes in a byte: byte i of a group holds those of elements i, i + width, i + 2 width, ...,
// see `ternary_groups` in microadam_dist/layout/state.py

constexpr int kDigits = 5, kTernaryBytes = 104;  // of a whole group

struct TernaryGroup {
  uint8* packed;
  int numel, width;
};

template <class Traits>
__device__ __forceinline__ TernaryGroup ternary_group(int chunk, const Block<Traits>& block) {
  const int group = group_of<Traits>(chunk), numel = min(max(block.numel() - group * kGroup, 0), kGroup);
  return {in_global(block.codes) + group * kTernaryBytes, numel, 8 * ((numel + 8 * kDigits - 1) / (8 * kDigits))};
}

// 2^32 / 3^(digit + 1), rounded up.
__device__ __forceinline__ uint32 fraction_of_digit(int digit) {
  return digit == 0   ? 0x55555556u
         : digit == 1 ? 0x1c71c71du
         : digit == 2 ? 0x097b425fu
         : digit == 3 ? 0x03291620u
                      : 0x010db20bu;
}

// Sixteen codes as they are stored: of each half the eight bytes, and which of their digits.
struct TernaryCodes {
  uint32 words[4];
  uint32 fractions[2];
};

// A byte without its higher digits as a fraction of what they are worth: three times that begins with the digit.
__device__ __forceinline__ float number_of(const TernaryCodes& codes, int j, uint32 power) {
  const uint32 byte = codes.words[j / 4] >> (8 * (j % 4)) & 0xffu;
  return as_float(__umulhi(byte * codes.fractions[j / 8], 3u) + power);
}

// Eight neighbours that begin at a multiple of eight are the same digit of neighbouring bytes.
template <class Traits>
__device__ __forceinline__ void load_ternary(TernaryCodes& codes, int chunk, const Block<Traits>& block) {
  const TernaryGroup group = ternary_group(chunk, block);
  codes = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = lane_of_thread() * kVector + 8 * half;
    if (place >= group.numel) continue;
    const int digit = place / group.width;
    const uint8* const p = group.packed + (place - digit * group.width);
    codes.fractions[half] = fraction_of_digit(digit);
    if constexpr (Traits::kAligned) {
      const uint2 eight = *reinterpret_cast<const uint2*>(p);
      codes.words[2 * half] = eight.x;
      codes.words[2 * half + 1] = eight.y;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) codes.words[2 * half + i / 4] |= static_cast<uint32>(p[i]) << (8 * (i % 4));
    }
  }
}

// For whole warps.
template <class Traits>
__device__ __forceinline__ void store_ternary(const Codes<8>& codes, int chunk, Shared<Traits>& s) {
  const TernaryGroup group = ternary_group(chunk, s.block);
  uint32* const words = reinterpret_cast<uint32*>(group_space(s.keys));  // no longer needed
  const int lane = lane_of_thread();
  reinterpret_cast<uint4*>(words)[lane] = make_uint4(codes.words[0], codes.words[1], codes.words[2], codes.words[3]);
  __syncwarp();
  if (4 * lane < group.width) {
    uint32 sums = 0;  // of four bytes
#pragma unroll
    for (int digit = kDigits - 1; digit >= 0; --digit) {
      const int i = digit * group.width / 4 + lane;
      sums = 3 * sums + (i < kGroup / 4 ? words[i] : 0);
    }
    uint8* const p = group.packed + 4 * lane;
    if constexpr (Traits::kAligned) {
      *reinterpret_cast<uint32*>(p) = sums;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) p[i] = static_cast<uint8>(sums >> (8 * i));
    }
  }
  __syncwarp();
}

// ---- all of them

template <class Traits>
using CodesOf = Codes<Traits::kCodeBits>;

// As load_chunk_codes() leaves them.
template <bool kIsTernary, int kBits>
struct Loaded {
  using Type = Codes<kBits>;
};
template <int kBits>
struct Loaded<true, kBits> {
  using Type = TernaryCodes;
};
template <class Traits>
using LoadedCodes = typename Loaded<Traits::kIsTernary, Traits::kCodeBits>::Type;

// The codes of a chunk; none beyond the block.
template <class Traits>
__device__ __forceinline__ void load_chunk_codes(LoadedCodes<Traits>& codes, int chunk, const Block<Traits>& block) {
  if constexpr (Traits::kIsTernary) {
    load_ternary(codes, chunk, block);
  } else {
    const int first = first_element<Traits>(chunk);
    const uint8* const p = in_global(block.codes) + static_cast<uint32>(first) / kVector * CodesOf<Traits>::kBytes;
    load_codes<Traits::kAligned>(codes, p, block.numel() - first);
  }
}

// For whole warps; codes beyond the block are zeros.
template <class Traits>
__device__ __forceinline__ void store_chunk_codes(const CodesOf<Traits>& codes, int chunk, Shared<Traits>& s) {
  if constexpr (Traits::kIsTernary) {
    store_ternary(codes, chunk, s);
  } else {
    const int first = first_element<Traits>(chunk);
    uint8* const p = in_global(s.block.codes) + static_cast<uint32>(first) / kVector * CodesOf<Traits>::kBytes;
    store_codes<Traits::kAligned>(p, codes, s.block.numel() - first);
  }
}

}  // namespace microadam
