// The error feedback: a = g * grad_scale + (codes * step_q + lo), and the residual quantized again.
#pragma once

#include "kernel.h"
#include "vector_loops.h"

namespace microadam {
namespace {

constexpr float kLevels = 15.f;

inline int num_buckets(int numel, int64_t bucket_size) {
  return static_cast<int>((numel + bucket_size - 1) / bucket_size);
}

// Whether a tile never lies in two buckets. The other sizes take plain loops.
inline bool buckets_hold_tiles(int numel, int64_t bucket_size) {
  return bucket_size % kTile == 0 || numel <= bucket_size;
}

// The largest magnitude of each group of a tile; which elements make up a group does not matter.
inline void store_maxima(const Floats (&a)[kTileVectors], uint32_t* maxima) {
  for (int i = 0; i < kTileVectors; i += kGroup) {
    Ints largest = magnitude(a[i]);
    for (int j = 1; j < kGroup; ++j) largest = max(largest, magnitude(a[i + j]));
    store_ints(maxima + i / kGroup * kLanes, largest);
  }
}

inline void tile_maxima(const float* a, uint32_t* maxima) {
  Floats tile[kTileVectors];
  for (int i = 0; i < kTileVectors; ++i) tile[i] = load(a + i * kLanes);
  store_maxima(tile, maxima);
}

// lo and step_q = (hi - lo) / 15 of every bucket.
inline void load_ranges(const Block& block, int count, const Scratch& s) {
  convert(s.bucket_lo, block.bucket_lo, count);
  convert(s.bucket_factor, block.bucket_hi, count);
  for (int i = 0; i < count; i += kLanes) {
    const Floats width = load(s.bucket_factor + i) - load(s.bucket_lo + i);
    store(s.bucket_factor + i, width / splat(kLevels));
  }
}

template <class Grad>
inline void accumulate_tile(const Grad* grad, Floats grad_scale, const uint8_t* codes, const Decoder& decoder,
                            float* accumulator, uint32_t* maxima) {
  Floats a[kTileVectors];
  decode_64(decoder, codes, a);
  for (int i = 0; i < kTileVectors; ++i) {
    a[i] = load(grad + i * kLanes) * grad_scale + a[i];
    store(accumulator + i * kLanes, a[i]);
  }
  store_maxima(a, maxima);
}

// The accumulator in tiles. The last tile may be short; beyond the block it holds rubbish.
template <class Grad>
inline void accumulate_tiles(const Grad* grad, const Block& block, const Step& step, const Scratch& s) {
  const uint8_t* codes = block.codes;
  float* accumulator = s.accumulator;
  uint32_t* maxima = s.maxima;
  const int64_t numel = block.numel;
  Prefetcher weights = prefetch_half(block.param, element_bytes(step.param_dtype), numel, 0);
  const Floats grad_scale = splat(step.scalars->grad_scale);
  int64_t i = 0;
  for (int bucket = 0; i < numel; ++bucket) {
    const Decoder decoder = make_decoder(s.bucket_factor[bucket], s.bucket_lo[bucket]);
    const int64_t end = smaller(i + step.bucket_size, numel);
    for (; i + kTile <= end; i += kTile) {
      weights.ask();
      accumulate_tile(grad + i, grad_scale, codes + i / 2, decoder, accumulator + i, maxima + i / kGroup);
    }
    const int64_t rest = end - i;
    if (rest == 0) continue;
    Grad last_grad[kTile] = {};
    uint8_t last_codes[kTile / 2] = {};
    memcpy(last_grad, grad + i, static_cast<size_t>(rest) * sizeof(Grad));
    memcpy(last_codes, codes + i / 2, static_cast<size_t>(rest + 1) / 2);
    accumulate_tile(last_grad, grad_scale, last_codes, decoder, accumulator + i, maxima + i / kGroup);
    i = end;
  }
}

template <class Grad>
inline void accumulate_one_by_one(const Grad* grad, const Block& block, const Step& step, const Scratch& s) {
  const float grad_scale = step.scalars->grad_scale;
  int64_t i = 0;
  for (int bucket = 0; i < block.numel; ++bucket) {
    const float lo = s.bucket_lo[bucket], step_q = s.bucket_factor[bucket];
    const int64_t end = smaller(i + step.bucket_size, block.numel);
    for (; i < end; ++i) {
      const int code = block.codes[i / 2] >> (i % 2 * 4) & 15;
      s.accumulator[i] = to_float(grad[i]) * grad_scale + (static_cast<float>(code) * step_q + lo);
    }
  }
  for (i = 0; i + kTile <= block.numel; i += kTile) tile_maxima(s.accumulator + i, s.maxima + i / kGroup);
}

// a = g * grad_scale + (codes * step_q + lo), zero from the end of the block to the end of its last tile; and the
// largest magnitude of every group.
template <class Grad>
inline void accumulate(const Grad* grad, const Block& block, const Step& step, const Scratch& s) {
  load_ranges(block, num_buckets(block.numel, step.bucket_size), s);
  if (buckets_hold_tiles(block.numel, step.bucket_size)) {
    accumulate_tiles(grad, block, step, s);
  } else {
    accumulate_one_by_one(grad, block, step, s);
  }
  const int whole = block.numel / kTile * kTile;
  if (whole == block.numel) return;
  for (int i = block.numel; i < whole + kTile; ++i) s.accumulator[i] = 0.f;
  tile_maxima(s.accumulator + whole, s.maxima + whole / kGroup);
}

// a[I] = 0
inline void clear_kept(const Block& block, const Scratch& s) {
  float* accumulator = s.accumulator;
  const uint16_t* indices = s.indices;
  MICROADAM_UNROLL
  for (int i = 0; i < block.num_kept; ++i) accumulator[indices[i]] = 0.f;
}

inline void tile_range(const float* tile, Floats* low, Floats* high) {
  *low = *high = load(tile);
  for (int i = 1; i < kTileVectors; ++i) {
    const Floats x = load(tile + i * kLanes);
    *low = min(*low, x);
    *high = max(*high, x);
  }
}

// Minimum and maximum of every bucket, to bucket_lo and bucket_factor. The residual is filled up to a whole tile.
inline void find_ranges_in_tiles(const Block& block, const Step& step, const Scratch& s) {
  const float* residual = s.accumulator;
  float *bucket_lo = s.bucket_lo, *bucket_hi = s.bucket_factor;
  const int64_t numel = block.numel, grad_bytes = element_bytes(step.grad_dtype);
  Prefetcher next_grad = prefetch_half(following(block.grad, numel * grad_bytes), grad_bytes, numel, 0);
  int64_t i = 0;
  for (int bucket = 0; i < numel; ++bucket) {
    const int64_t end = smaller(i + step.bucket_size, numel);
    Floats low, high;
    tile_range(residual + i, &low, &high);
    next_grad.ask();
    for (i += kTile; i < end; i += kTile) {
      Floats tile_low, tile_high;
      tile_range(residual + i, &tile_low, &tile_high);
      next_grad.ask();
      low = min(low, tile_low);
      high = max(high, tile_high);
    }
    reduce_range(low, high, bucket_lo + bucket, bucket_hi + bucket);
    i = end;
  }
}

inline void find_ranges_one_by_one(const float* residual, int64_t numel, int64_t bucket_size, const Scratch& s) {
  int64_t i = 0;
  for (int bucket = 0; i < numel; ++bucket) {
    const int64_t end = smaller(i + bucket_size, numel);
    float low = residual[i], high = low;
    for (; i < end; ++i) {
      low = residual[i] < low ? residual[i] : low;
      high = residual[i] > high ? residual[i] : high;
    }
    s.bucket_lo[bucket] = low;
    s.bucket_factor[bucket] = high;
  }
}

// lo, hi = bf16(min), bf16(max), stored; and 15 / (hi - lo), or 0 where that is not finite.
inline void store_ranges(const Block& block, int count, const Scratch& s) {
  convert(block.bucket_lo, s.bucket_lo, count);
  convert(block.bucket_hi, s.bucket_factor, count);
  convert(s.bucket_lo, block.bucket_lo, count);
  convert(s.bucket_factor, block.bucket_hi, count);
  for (int i = 0; i < count; i += kLanes) {
    const Floats inverse = splat(kLevels) / (load(s.bucket_factor + i) - load(s.bucket_lo + i));
    const Lanes finite = less(magnitude(inverse), splat(static_cast<int32_t>(kInfBits)));
    store(s.bucket_factor + i, choose(finite, inverse, splat(0.f)));
  }
}

inline void encode_tile(const float* residual, Floats lo, Floats inverse, uint8_t* codes) {
  Floats scaled[kTileVectors];
  for (int i = 0; i < kTileVectors; ++i) scaled[i] = (load(residual + i * kLanes) - lo) * inverse;
  encode_64(codes, scaled);
}

inline void encode_tiles(const Block& block, const Step& step, const Scratch& s) {
  const float* residual = s.accumulator;
  uint8_t* codes = block.codes;
  const int64_t numel = block.numel, grad_bytes = element_bytes(step.grad_dtype);
  Prefetcher next_grad = prefetch_half(following(block.grad, numel * grad_bytes), grad_bytes, numel, 1);
  int64_t i = 0;
  for (int bucket = 0; i < numel; ++bucket) {
    const Floats lo = splat(s.bucket_lo[bucket]), inverse = splat(s.bucket_factor[bucket]);
    const int64_t end = smaller(i + step.bucket_size, numel);
    for (; i + kTile <= end; i += kTile) {
      next_grad.ask();
      prefetch(following(codes, (numel + i) / 2));
      encode_tile(residual + i, lo, inverse, codes + i / 2);
    }
    const int64_t rest = end - i;
    if (rest == 0) continue;
    uint8_t last_codes[kTile / 2];
    encode_tile(residual + i, lo, inverse, last_codes);
    if (rest % 2 != 0) last_codes[rest / 2] &= 15;
    memcpy(codes + i / 2, last_codes, static_cast<size_t>(rest + 1) / 2);
    i = end;
  }
}

inline void encode_one_by_one(const Block& block, const Step& step, const Scratch& s) {
  int64_t i = 0;
  for (int bucket = 0; i < block.numel; ++bucket) {
    const float lo = s.bucket_lo[bucket], inverse = s.bucket_factor[bucket];
    const int64_t end = smaller(i + step.bucket_size, block.numel);
    for (; i < end; ++i) {
      const float scaled = (s.accumulator[i] - lo) * inverse;
      const float clipped = scaled < 0.f ? 0.f : scaled > kLevels ? kLevels : scaled;
      // The sum's last bit is worth 1: it rounds to the nearest integer, ties to even.
      const uint32_t code = float_bits(clipped + 0x1.8p23f) & 15u;
      uint8_t* byte = block.codes + i / 2;
      *byte = static_cast<uint8_t>(i % 2 == 0 ? code : *byte | code << 4);
    }
  }
}

// The residual in the accumulator becomes the new error: lo, hi and
// codes = clip(rint((a - lo) * (15 / (hi - lo))), 0, 15).
inline void encode_error(const Block& block, const Step& step, const Scratch& s) {
  const int count = num_buckets(block.numel, step.bucket_size);
  if (buckets_hold_tiles(block.numel, step.bucket_size)) {
    const int end = round_up(block.numel, kTile);
    for (int i = block.numel; i < end; ++i) s.accumulator[i] = s.accumulator[block.numel - 1];
    find_ranges_in_tiles(block, step, s);
    store_ranges(block, count, s);
    encode_tiles(block, step, s);
  } else {
    find_ranges_one_by_one(s.accumulator, block.numel, step.bucket_size, s);
    store_ranges(block, count, s);
    encode_one_by_one(block, step, s);
  }
}

}  // namespace
}  // namespace microadam
