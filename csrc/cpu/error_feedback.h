// The error feedback: a = g * grad_scale + (codes * step + lo), and the residual quantized again.
//
// What a bucket stores, and the numbers that its codes stand for, see microadam_dist/arithmetic/error_feedback.py:
//
//   4, 8 bits   lo, hi = bf16(min a), bf16(max a)     step = (hi - lo) / levels
//   fewer       scale, of the larger magnitude        lo = -scale, step = scale; with 1 bit step = 2 scale
#pragma once

#include "codes.h"
#include "kernel.h"
#include "vector_loops.h"

namespace microadam {
namespace {

constexpr int kMaxScaledLevels = 3;

inline int num_buckets(int numel, int64_t bucket_size) {
  return static_cast<int>((numel + bucket_size - 1) / bucket_size);
}

// Whether a tile never lies in two buckets. The other sizes take plain loops.
inline bool buckets_hold_tiles(int numel, int64_t bucket_size) {
  return bucket_size % kTile == 0 || numel <= bucket_size;
}

// ---- the codes of a block, as the phases read and write them; the first element of a tile is a multiple of kTile

// Of 4 bits: where they are stored.
struct StoredCodes {
  uint8_t* codes;

  static Decoder decoder(float step, float lo) { return make_decoder(step, lo); }
  void decode(const Decoder& decoder, int64_t first, Floats (&x)[kTileVectors]) const {
    decode_64(decoder, codes + first / 2, x);
  }
  void decode_first(const Decoder& decoder, int64_t first, int64_t count, Floats (&x)[kTileVectors]) const {
    uint8_t padded[kTile / 2] = {};
    memcpy(padded, codes + first / 2, static_cast<size_t>(count + 1) / 2);
    decode_64(decoder, padded, x);
  }
  float get(int64_t i) const { return static_cast<float>(codes[i / 2] >> (i % 2 * 4) & 15); }

  void encode(int64_t first, const Floats (&x)[kTileVectors]) const { encode_64(codes + first / 2, x); }
  void encode_first(int64_t first, int64_t count, const Floats (&x)[kTileVectors]) const {
    uint8_t padded[kTile / 2];
    encode_64(padded, x);
    if (count % 2 != 0) padded[count / 2] &= 15;
    memcpy(codes + first / 2, padded, static_cast<size_t>(count + 1) / 2);
  }
  void put(int64_t i, uint32_t code) const {
    uint8_t* const byte = codes + i / 2;
    *byte = static_cast<uint8_t>(i % 2 == 0 ? code : *byte | code << 4);
  }
  void prefetch_next(int64_t first, int64_t numel) const { prefetch(following(codes, (numel + first) / 2)); }
};

// Of other widths: one byte each, in a scratch buffer.
struct UnpackedCodes {
  struct Decoder {
    Floats step, lo;
  };
  uint8_t* codes;
  int levels;

  static Decoder decoder(float step, float lo) { return {splat(step), splat(lo)}; }
  void decode(const Decoder& decoder, int64_t first, Floats (&x)[kTileVectors]) const {
    for (int i = 0; i < kTileVectors; ++i) {
      x[i] = load_codes(codes + first + i * kLanes) * decoder.step + decoder.lo;
    }
  }
  void decode_first(const Decoder& decoder, int64_t first, int64_t, Floats (&x)[kTileVectors]) const {
    decode(decoder, first, x);
  }
  float get(int64_t i) const { return codes[i]; }

  void encode(int64_t first, const Floats (&x)[kTileVectors]) const { round_64(codes + first, x, levels); }
  void encode_first(int64_t first, int64_t, const Floats (&x)[kTileVectors]) const { encode(first, x); }
  void put(int64_t i, uint32_t code) const { codes[i] = static_cast<uint8_t>(code); }
  void prefetch_next(int64_t, int64_t) const {}
};

// There are none.
struct NoCodes {};

// ---- the accumulator

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

// lo and step of every bucket.
inline void load_levels(const Block& block, const Step& step, int count, const Scratch& s) {
  if (step.levels <= kMaxScaledLevels) {
    const float steps = step.levels == 1 ? 2.f : 1.f;
    convert(s.bucket_factor, block.bucket_scale, count);
    for (int i = 0; i < count; i += kLanes) {
      const Floats scale = load(s.bucket_factor + i);
      store(s.bucket_lo + i, -scale);
      store(s.bucket_factor + i, scale * splat(steps));
    }
    return;
  }
  convert(s.bucket_lo, block.bucket_lo, count);
  convert(s.bucket_factor, block.bucket_hi, count);
  const Floats levels = splat(static_cast<float>(step.levels));
  for (int i = 0; i < count; i += kLanes) {
    const Floats width = load(s.bucket_factor + i) - load(s.bucket_lo + i);
    store(s.bucket_factor + i, width / levels);
  }
}

// Adds the gradient to a tile of the error.
template <class Grad>
inline void add_tile(const Grad* grad, Floats grad_scale, Floats (&a)[kTileVectors], float* accumulator,
                     uint32_t* maxima) {
  for (int i = 0; i < kTileVectors; ++i) {
    a[i] = load(grad + i * kLanes) * grad_scale + a[i];
    store(accumulator + i * kLanes, a[i]);
  }
  store_maxima(a, maxima);
}

// The accumulator in tiles. The last tile may be short; beyond the block it holds rubbish.
template <class Grad, class Codes>
inline void accumulate_tiles(const Grad* grad, const Codes& codes, const Block& block, const Step& step,
                             const Scratch& s) {
  float* accumulator = s.accumulator;
  uint32_t* maxima = s.maxima;
  const int64_t numel = block.numel;
  Prefetcher weights = prefetch_half(block.param, element_bytes(step.param_dtype), numel, 0);
  const Floats grad_scale = splat(step.scalars->grad_scale);
  Floats a[kTileVectors];
  int64_t i = 0;
  for (int bucket = 0; i < numel; ++bucket) {
    const auto decoder = Codes::decoder(s.bucket_factor[bucket], s.bucket_lo[bucket]);
    const int64_t end = smaller(i + step.bucket_size, numel);
    for (; i + kTile <= end; i += kTile) {
      weights.ask();
      codes.decode(decoder, i, a);
      add_tile(grad + i, grad_scale, a, accumulator + i, maxima + i / kGroup);
    }
    const int64_t rest = end - i;
    if (rest == 0) continue;
    Grad last_grad[kTile] = {};
    memcpy(last_grad, grad + i, static_cast<size_t>(rest) * sizeof(Grad));
    codes.decode_first(decoder, i, rest, a);
    add_tile(last_grad, grad_scale, a, accumulator + i, maxima + i / kGroup);
    i = end;
  }
}

template <class Grad, class Codes>
inline void accumulate_one_by_one(const Grad* grad, const Codes& codes, const Block& block, const Step& step,
                                  const Scratch& s) {
  const float grad_scale = step.scalars->grad_scale;
  int64_t i = 0;
  for (int bucket = 0; i < block.numel; ++bucket) {
    const float lo = s.bucket_lo[bucket], width = s.bucket_factor[bucket];
    const int64_t end = smaller(i + step.bucket_size, block.numel);
    for (; i < end; ++i) s.accumulator[i] = to_float(grad[i]) * grad_scale + (codes.get(i) * width + lo);
  }
  for (i = 0; i + kTile <= block.numel; i += kTile) tile_maxima(s.accumulator + i, s.maxima + i / kGroup);
}

template <class Grad, class Codes>
inline void add_error(const Grad* grad, const Codes& codes, const Block& block, const Step& step, const Scratch& s) {
  load_levels(block, step, num_buckets(block.numel, step.bucket_size), s);
  if (buckets_hold_tiles(block.numel, step.bucket_size)) {
    accumulate_tiles(grad, codes, block, step, s);
  } else {
    accumulate_one_by_one(grad, codes, block, step, s);
  }
}

// Without an error.
template <class Grad>
inline void add_error(const Grad* grad, const NoCodes&, const Block& block, const Step& step, const Scratch& s) {
  Prefetcher weights = prefetch_half(block.param, element_bytes(step.param_dtype), block.numel, 0);
  const Floats grad_scale = splat(step.scalars->grad_scale);
  Floats a[kTileVectors];
  for (int64_t i = 0; i < block.numel; i += kTile) {
    Grad last_grad[kTile] = {};
    const bool is_last = i + kTile > block.numel;
    if (is_last) memcpy(last_grad, grad + i, static_cast<size_t>(block.numel - i) * sizeof(Grad));
    weights.ask();
    for (int j = 0; j < kTileVectors; ++j) {
      a[j] = load((is_last ? last_grad : grad + i) + j * kLanes) * grad_scale;
      store(s.accumulator + i + j * kLanes, a[j]);
    }
    store_maxima(a, s.maxima + i / kGroup);
  }
}

// a = g * grad_scale + (codes * step + lo), zero from the end of the block to the end of its last tile; and the largest
// magnitude of every group.
template <class Grad>
inline void accumulate(const Grad* grad, const Block& block, const Step& step, const Scratch& s) {
  if (step.levels == 0) {
    add_error(grad, NoCodes(), block, step, s);
  } else if (step.levels == 15) {
    add_error(grad, StoredCodes{block.codes}, block, step, s);
  } else {
    unpack_codes(block.codes, block.numel, step.levels, s.codes);
    add_error(grad, UnpackedCodes{s.codes, step.levels}, block, step, s);
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

// ---- the new error

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

// Rounds `count` numbers to bf16, which are stored, too.
inline void round_to_bf16(float* x, Bf16* stored, int count) {
  convert(stored, x, count);
  convert(x, stored, count);
}

// `inverse`, or 0 where it is not finite.
inline Floats or_zero(Floats inverse) {
  const Lanes finite = less(magnitude(inverse), splat(static_cast<int32_t>(kInfBits)));
  return choose(finite, inverse, splat(0.f));
}

// lo, hi = bf16(min), bf16(max), stored; and levels / (hi - lo), or 0 where that is not finite.
inline void store_ranges(const Block& block, const Step& step, int count, const Scratch& s) {
  round_to_bf16(s.bucket_lo, block.bucket_lo, count);
  round_to_bf16(s.bucket_factor, block.bucket_hi, count);
  const Floats levels = splat(static_cast<float>(step.levels));
  for (int i = 0; i < count; i += kLanes) {
    store(s.bucket_factor + i, or_zero(levels / (load(s.bucket_factor + i) - load(s.bucket_lo + i))));
  }
}

// The part of its largest magnitude that is a bucket's scale.
inline float scale_factor(int levels) { return levels == 1 ? 0.375f : levels == kTernaryLevels ? 0.625f : 0.5f; }

// scale = bf16(factor * the end of the range that is farther from zero), without its sign below 2 bits, stored; and
// lo = -scale, 1 / scale. A scale whose inverse is not finite becomes 0.
inline void store_scales(const Block& block, const Step& step, int count, const Scratch& s) {
  float *lo = s.bucket_lo, *hi = s.bucket_factor;
  round_to_bf16(lo, block.bucket_scale, count);
  round_to_bf16(hi, block.bucket_scale, count);
  const Floats factor = splat(scale_factor(step.levels));
  for (int i = 0; i < count; i += kLanes) {
    const Floats low = load(lo + i), high = load(hi + i);
    Floats extreme = choose(less(magnitude(high), magnitude(low)), low, high);
    if (step.levels < kMaxScaledLevels) extreme = max(extreme, -extreme);
    store(hi + i, extreme * factor);
  }
  round_to_bf16(hi, block.bucket_scale, count);
  for (int i = 0; i < count; i += kLanes) {
    Floats scale = load(hi + i);
    const Lanes is_zero = equal(magnitude(or_zero(splat(1.f) / scale)), splat(0));
    scale = choose(is_zero, splat(0.f), scale);
    store(hi + i, scale);
    store(lo + i, -scale);
  }
  convert(block.bucket_scale, hi, count);
  for (int i = 0; i < count; i += kLanes) {
    store(hi + i, or_zero(splat(1.f) / load(hi + i)));
  }
}

// Of a tile (a - lo) * inverse; its codes are the nearest integers.
inline void scale_tile(const float* residual, Floats lo, Floats inverse, Floats (&x)[kTileVectors]) {
  for (int i = 0; i < kTileVectors; ++i) x[i] = (load(residual + i * kLanes) - lo) * inverse;
}

// The code of 1 bit for zeros at even and odd places.
inline uint32_t code_of_zero(const Step& step, int64_t place) {
  return static_cast<uint32_t>(step.scalars->step_key + place) & 1u;
}

// Of a tile the codes of 1 bit: 1 where it is positive.
inline void sign_tile(const float* residual, Floats codes_of_zeros, Floats (&x)[kTileVectors]) {
  const Ints zero = splat(0);
  for (int i = 0; i < kTileVectors; ++i) {
    const Floats a = load(residual + i * kLanes);
    const Lanes positive = less(zero, magnitude(max(a, splat(0.f))));
    x[i] = choose(positive, splat(1.f), choose(equal(zero, magnitude(a)), codes_of_zeros, splat(0.f)));
  }
}

template <class Codes>
inline void encode_tiles(const Codes& codes, const Block& block, const Step& step, const Scratch& s) {
  const float* residual = s.accumulator;
  const int64_t numel = block.numel, grad_bytes = element_bytes(step.grad_dtype);
  Prefetcher next_grad = prefetch_half(following(block.grad, numel * grad_bytes), grad_bytes, numel, 1);
  float of_zeros[kLanes];
  for (int i = 0; i < kLanes; ++i) of_zeros[i] = static_cast<float>(code_of_zero(step, i));
  const Floats codes_of_zeros = load(of_zeros);
  Floats x[kTileVectors];
  int64_t i = 0;
  for (int bucket = 0; i < numel; ++bucket) {
    const Floats lo = splat(s.bucket_lo[bucket]), inverse = splat(s.bucket_factor[bucket]);
    const auto scale = [&](const float* tile) {
      step.levels == 1 ? sign_tile(tile, codes_of_zeros, x) : scale_tile(tile, lo, inverse, x);
    };
    const int64_t end = smaller(i + step.bucket_size, numel);
    for (; i + kTile <= end; i += kTile) {
      next_grad.ask();
      codes.prefetch_next(i, numel);
      scale(residual + i);
      codes.encode(i, x);
    }
    const int64_t rest = end - i;
    if (rest == 0) continue;
    scale(residual + i);
    codes.encode_first(i, rest, x);
    i = end;
  }
}

template <class Codes>
inline void encode_one_by_one(const Codes& codes, const Block& block, const Step& step, const Scratch& s) {
  const float levels = static_cast<float>(step.levels);
  int64_t i = 0;
  for (int bucket = 0; i < block.numel; ++bucket) {
    const float lo = s.bucket_lo[bucket], inverse = s.bucket_factor[bucket];
    const int64_t end = smaller(i + step.bucket_size, block.numel);
    for (; i < end; ++i) {
      const float a = s.accumulator[i];
      if (step.levels == 1) {
        codes.put(i, a == 0.f ? code_of_zero(step, i) : a > 0.f);
        continue;
      }
      const float scaled = (a - lo) * inverse;
      const float clipped = scaled < 0.f ? 0.f : scaled > levels ? levels : scaled;
      // The sum's last bit is worth 1: it rounds to the nearest integer, ties to even.
      codes.put(i, float_bits(clipped + 0x1.8p23f) & 255u);
    }
  }
}

template <class Codes>
inline void encode_residual(const Codes& codes, const Block& block, const Step& step, const Scratch& s) {
  const bool in_tiles = buckets_hold_tiles(block.numel, step.bucket_size);
  if (in_tiles) {
    const int end = round_up(block.numel, kTile);
    for (int i = block.numel; i < end; ++i) s.accumulator[i] = s.accumulator[block.numel - 1];
    find_ranges_in_tiles(block, step, s);
  } else {
    find_ranges_one_by_one(s.accumulator, block.numel, step.bucket_size, s);
  }
  const int count = num_buckets(block.numel, step.bucket_size);
  step.levels <= kMaxScaledLevels ? store_scales(block, step, count, s) : store_ranges(block, step, count, s);
  in_tiles ? encode_tiles(codes, block, step, s) : encode_one_by_one(codes, block, step, s);
}

// The residual in the accumulator becomes the new error: codes = clip(rint((a - lo) * (1 / step)), 0, levels).
inline void encode_error(const Block& block, const Step& step, const Scratch& s) {
  if (step.levels == 15) {
    encode_residual(StoredCodes{block.codes}, block, step, s);
  } else {
    encode_residual(UnpackedCodes{s.codes, step.levels}, block, step, s);
    pack_codes(s.codes, block.numel, step.levels, block.codes);
  }
}

}  // namespace
}  // namespace microadam
