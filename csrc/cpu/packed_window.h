// The packed window: 12-bit indices, and 8-bit values with a scale for each slot of a block.
//
//   scale = bf16(max|V| / 127);  codes = clip(rint(V * (1 / scale)), -127, 127);  V = codes * scale;  a[I] -= V
#pragma once

#include "kernel.h"
#include "vector_loops.h"

namespace microadam {
namespace {

constexpr float kMaxCode = 127.f;

inline void pack_indices(const uint16_t* indices, int count, uint8_t* packed) {
  int i = 0;
  for (; i + 2 <= count; i += 2, packed += 3) {
    const uint32_t pair = indices[i] | static_cast<uint32_t>(indices[i + 1]) << 12;
    packed[0] = static_cast<uint8_t>(pair);
    packed[1] = static_cast<uint8_t>(pair >> 8);
    packed[2] = static_cast<uint8_t>(pair >> 16);
  }
  if (i < count) {
    packed[0] = static_cast<uint8_t>(indices[i]);
    packed[1] = static_cast<uint8_t>(indices[i] >> 8);
  }
}

inline void unpack_indices(const Block& block, int64_t slot, uint16_t* indices) {
  const uint8_t* packed = block.indices + slot * block.index_bytes;
  const int count = block.num_kept;
  int i = 0;
  for (; i + 2 <= count; i += 2, packed += 3) {
    indices[i] = static_cast<uint16_t>(packed[0] | (packed[1] & 15) << 8);
    indices[i + 1] = static_cast<uint16_t>(packed[1] >> 4 | packed[2] << 4);
  }
  if (i < count) indices[i] = static_cast<uint16_t>(packed[0] | (packed[1] & 15) << 8);
}

inline void unpack_values(const Block& block, int64_t slot, float* values) {
  const float scale = to_float(block.scales[slot]);
  const int8_t* codes = reinterpret_cast<const int8_t*>(block.values + slot * block.value_bytes);
  for (int i = 0; i < block.num_kept; ++i) values[i] = static_cast<float>(codes[i]) * scale;
}

inline float largest_kept(const Bf16* values, int count) {
  uint16_t largest = 0;
  for (int i = 0; i < count; ++i) {
    const uint16_t key = values[i].bits & 0x7FFF;
    largest = key > largest ? key : largest;
  }
  return to_float(Bf16{largest});
}

// Stores the newest slot, and leaves in the accumulator what is not stored.
inline void pack_slot(const Block& block, const Step& step, const Scratch& s) {
  const int64_t slot = step.scalars->newest_slot;
  pack_indices(s.indices, block.num_kept, block.indices + slot * block.index_bytes);
  Bf16* stored_scale = block.scales + slot;
  round_to(stored_scale, largest_kept(s.values, block.num_kept) / kMaxCode);
  const float scale = to_float(*stored_scale);
  float inverse = 1.f / scale;
  if (float_bits(inverse) >= kInfBits) inverse = 0.f;
  uint8_t* codes = block.values + slot * block.value_bytes;
  for (int i = 0; i < block.num_kept; ++i) {
    const float scaled = to_float(s.values[i]) * inverse;
    const float clipped = scaled < -kMaxCode ? -kMaxCode : scaled > kMaxCode ? kMaxCode : scaled;
    // The sum's last bit is worth 1: it rounds to the nearest integer, ties to even.
    codes[i] = static_cast<uint8_t>(float_bits(clipped + 0x1.8p23f));
    s.accumulator[s.indices[i]] -= static_cast<float>(static_cast<int8_t>(codes[i])) * scale;
  }
}

}  // namespace
}  // namespace microadam
