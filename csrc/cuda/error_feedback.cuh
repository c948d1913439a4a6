// The error feedback: a = g * grad_scale + (codes * step + lo), and the residual quantized again.
//
// What a bucket stores, and the numbers that its codes stand for, see microadam_dist/arithmetic/error_feedback.py:
//
//   4, 8 bits   lo, hi = bf16(min a), bf16(max a)     step = (hi - lo) / levels
//   fewer       scale, of the larger magnitude        lo = -scale, step = scale; with 1 bit step = 2 scale
#pragma once

#include "codes.cuh"

namespace microadam {

template <class Traits>
__device__ __forceinline__ int32 bucket_of(int element) {
  return static_cast<uint32>(element) / static_cast<uint32>(Traits::kBucketSize);
}

// What a bucket stores: lo and hi, or the scale alone.
struct Stored {
  Bf16 first, second;
};

template <class Traits>
__device__ __forceinline__ Stored load_stored(const Block<Traits>& block, int bucket) {
  if constexpr (Traits::kIsScaled) return {in_global(block.bucket_scale)[bucket], {}};
  return {in_global(block.bucket_lo)[bucket], in_global(block.bucket_hi)[bucket]};
}

template <class Traits>
__device__ __forceinline__ void store_stored(const Block<Traits>& block, int bucket, const Stored& stored) {
  if constexpr (Traits::kIsScaled) {
    in_global(block.bucket_scale)[bucket] = stored.first;
  } else {
    in_global(block.bucket_lo)[bucket] = stored.first;
    in_global(block.bucket_hi)[bucket] = stored.second;
  }
}

// The numbers that codes stand for.
struct Numbers {
  float lo, step;
};

template <class Traits>
__device__ __forceinline__ Numbers numbers_of(const Stored& stored) {
  const float first = to_float(stored.first);
  if constexpr (Traits::kIsScaled) return {-first, Traits::kLevels == 1 ? 2.f * first : first};
  const float range = to_float(stored.second) - first;
  constexpr float kLevels = static_cast<float>(Traits::kLevels);
  if constexpr (Traits::kLevels == 15) {
    // Multiplied with 1/15 as the sum of two numbers, which gives the same bits for every significand where no product
    // is subnormal.
    constexpr float kInverse = 1.f / 15.f, kInverseRest = static_cast<float>(1. / 15. - kInverse);
    if (float_bits(range) - 1u >= 0x20000000u) return {first, __fmaf_rn(range, kInverse, range * kInverseRest)};
  }
  return {first, __fdiv_rn(range, kLevels)};  // 15 levels: below 2^-63, but not 0
}

// a = g * grad_scale + (codes * step + lo), zero beyond the block.
template <class Traits>
__device__ __forceinline__ void accumulate(const Block<Traits>& block, float grad_scale, Elements<Traits>& a) {
  LoadedCodes<Traits> codes[Traits::kChunks];
  Stored stored[Traits::kChunks] = {};  // of the bucket of the first element, most often of all
#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
    const int first = first_element<Traits>(c);
    load_first<Traits::kAligned>(a[c], in_global(block.grad) + first, block.numel() - first);
    if constexpr (!Traits::kHasError) continue;
    load_chunk_codes(codes[c], c, block);
    if (first < block.numel()) stored[c] = load_stored(block, bucket_of<Traits>(first));
  }
  const auto add = [&](auto scaled) {
#pragma unroll
    for (int c = 0; c < Traits::kChunks; ++c) {
      const int first = first_element<Traits>(c);
      Numbers numbers = numbers_of<Traits>(stored[c]);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (!Traits::kAligned && first + j >= block.numel()) continue;
        if constexpr (!Traits::kHasError) {
          a[c][j] = scaled(a[c][j]);
          continue;
        }
        if (j > 0 && Traits::kBucketSize % kVector != 0 && first + j < block.numel()) {
          numbers = numbers_of<Traits>(load_stored(block, bucket_of<Traits>(first + j)));
        }
        // Rounded once: what 2^23 adds to the product is subtracted without an error.
        const uint32 power = in_register(0x4b000000u);
        const float product = __fmaf_rn(number_of(codes[c], j, power), numbers.step, -(as_float(power) * numbers.step));
        a[c][j] = scaled(a[c][j]) + (product + numbers.lo);
      }
    }
  };
  if (grad_scale == 1.f) {
    add([](float g) { return g; });
  } else {
    add([=](float g) { return g * grad_scale; });
  }
}

// What a bucket stores, and from where its codes count in steps of what: codes = clip(rint((a - lo) * inverse)).
struct Range {
  Stored stored;
  float lo, inverse;
};

__device__ __forceinline__ float inverse_or_zero(float levels, float x) {
  const float inverse = __fdiv_rn(levels, x);
  return fabsf(inverse) < as_float(kInfBits) ? inverse : 0.f;
}

// From the bounds of a bucket, bf16, the lower one in the lower half.
template <class Traits>
__device__ __forceinline__ Range make_range(uint32 pair) {
  const Bf16 low = {static_cast<uint16>(pair)}, high = {static_cast<uint16>(pair >> 16)};
  if constexpr (Traits::kIsScaled) {
    constexpr float kFactor = Traits::kLevels == 1 ? 0.375f : Traits::kLevels == 2 ? 0.625f : 0.5f;
    float extreme = fabsf(to_float(high)) < fabsf(to_float(low)) ? to_float(low) : to_float(high);
    if (Traits::kLevels < 3) extreme = fabsf(extreme);
    Bf16 scale = {bf16_bits(extreme * kFactor)};
    const float inverse = inverse_or_zero(1.f, to_float(scale));
    if (inverse == 0.f) scale.bits = 0;
    return {{scale, {}}, -to_float(scale), inverse};
  }
  const float range = to_float(high) - to_float(low);
  return {{low, high}, to_float(low), inverse_or_zero(static_cast<float>(Traits::kLevels), range)};
}

// rint((a - lo) * inverse), or any negative number if it is negative: the bits of a subnormal number count in steps of
// the smallest one.
__device__ __forceinline__ int32 level_of(float a, const Range& range) {
  const float scaled = (a - range.lo) * range.inverse;
  return static_cast<int32>(float_bits(scaled * as_float(1u)));
}

// Of 1 bit: 0 where the number is negative; the sign of a zero changes with the step and from element to element.
__device__ __forceinline__ uint32 sign_code(float a, int element, uint32 step_key) {
  const uint32 sign_of_zero = ~(element + step_key) << 31;
  return ~(a == 0.f ? sign_of_zero : float_bits(a)) >> 31;
}

// The codes of the first `count` elements of a chunk that lie in one bucket, and zeros.
template <class Traits>
__device__ __forceinline__ CodesOf<Traits> encode_elements(const float (&a)[kVector], const Range& range, int first,
                                                           int count, uint32 step_key) {
  constexpr int kBits = Traits::kCodeBits;
  CodesOf<Traits> codes = {};
  const auto level = [&](int j) {
    const int32 level = level_of(a[j], range);
    return Traits::kIsTernary ? min(level, Traits::kLevels) : level;
  };
#pragma unroll
  for (int j = kVector - 2; j >= 0; j -= 2) {
    uint32& word = codes.words[j * kBits / 32];
    const bool is_first = Traits::kAligned || j < count, is_second = Traits::kAligned || j + 1 < count;
    if constexpr (Traits::kLevels == 1) {
      const uint32 two = (is_second ? sign_code(a[j + 1], first + j + 1, step_key) << 1 : 0u) |
                         (is_first ? sign_code(a[j], first + j, step_key) : 0u);
      word = word << 2 | two;
    } else {
      word = put_first<kBits>(word, is_first ? level(j) : 0, is_second ? level(j + 1) : 0);
    }
  }
  return codes;
}

// Encodes chunk c of all threads, where kBucketsFitWarps.
template <class Traits>
__device__ __forceinline__ void encode_chunk(int c, const float (&a)[kVector], Shared<Traits>& s) {
  const int first = first_element<Traits>(c), count = s.block.numel() - first;
  float low = a[0], high = a[0];
#pragma unroll
  for (int j = 1; j < kVector; ++j) {
    if (!Traits::kAligned && j >= count) continue;
    low = fminf(low, a[j]);
    high = fmaxf(high, a[j]);
  }
  // {low, -high} of the bucket: the smallest of all, rounded first, which keeps their order.
  uint32 bounds = count > 0 ? bf16_pair(low, -high) : kInfBits | kInfBits >> 16;
#pragma unroll
  for (int distance = 1; distance * kVector < Traits::kBucketSize; distance *= 2) {
    bounds = min_pair(bounds, __shfl_xor_sync(kFullWarp, bounds, distance));
  }
  if (!Traits::kIsTernary && count <= 0) return;
  const Range range = make_range<Traits>(bounds ^ 0x80000000u);
  CodesOf<Traits> codes = encode_elements<Traits>(a, range, first, count, s.scalars.step_key);
  if (count <= 0) codes = {};
  store_chunk_codes(codes, c, s);
  if (count > 0 && static_cast<uint32>(first) % static_cast<uint32>(Traits::kBucketSize) == 0) {
    store_stored(s.block, bucket_of<Traits>(first), range.stored);
  }
}

// Integers in the order of the numbers, -0 below +0.
__device__ __forceinline__ int32 ordered(float x) {
  const int32 bits = static_cast<int32>(float_bits(x));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float from_ordered(int32 x) {
  return as_float(static_cast<uint32>(x ^ ((x >> 31) & 0x7fffffff)));
}

// Encodes the block for any other bucket size, many buckets at a time. The updates are no longer needed.
template <class Traits>
__device__ __forceinline__ void encode_any(const Elements<Traits>& a, Shared<Traits>& s) {
  constexpr int kAtOnce = Traits::kSection / 2, kBits = Traits::kCodeBits;
  const Block<Traits>& block = s.block;
  int32* const low = reinterpret_cast<int32*>(s.update);
  int32* const high = low + kAtOnce;
  CodesOf<Traits> codes[Traits::kChunks] = {};
  const int num_buckets = (block.numel() + Traits::kBucketSize - 1) / Traits::kBucketSize;
  for (int first_bucket = 0; first_bucket < num_buckets; first_bucket += kAtOnce) {
    const int count = min(num_buckets - first_bucket, kAtOnce);
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += Traits::kThreads) {
      low[i] = 0x7fffffff;
      high[i] = -0x7fffffff - 1;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < Traits::kChunks; ++c) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const int bucket = bucket_of<Traits>(first_element<Traits>(c) + j) - first_bucket;
        if (first_element<Traits>(c) + j >= block.numel() || bucket < 0 || bucket >= count) continue;
        atomicMin(&low[bucket], ordered(a[c][j]));
        atomicMax(&high[bucket], ordered(a[c][j]));
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += Traits::kThreads) {
      const Range range = make_range<Traits>(bf16_pair(from_ordered(low[i]), from_ordered(high[i])));
      store_stored(block, first_bucket + i, range.stored);
    }
#pragma unroll
    for (int c = 0; c < Traits::kChunks; ++c) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const int element = first_element<Traits>(c) + j, bucket = bucket_of<Traits>(element) - first_bucket;
        if (element >= block.numel() || bucket < 0 || bucket >= count) continue;
        const Range range = make_range<Traits>(bf16_pair(from_ordered(low[bucket]), from_ordered(high[bucket])));
        const uint32 code = Traits::kLevels == 1 ? sign_code(a[c][j], element, s.scalars.step_key)
                                                 : min(max(level_of(a[c][j], range), 0), Traits::kLevels);
        codes[c].words[j * kBits / 32] |= code << (j * kBits % 32);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) store_chunk_codes(codes[c], c, s);
}

}  // namespace microadam
