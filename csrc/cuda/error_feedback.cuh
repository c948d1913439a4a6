// The error feedback: a = g * grad_scale + (codes * step_q + lo), and the residual quantized again.
#pragma once

#include "block.cuh"

namespace microadam {

constexpr float kLevels = 15.f;

// Code number j of eight times step_q, rounded once. The code's bits become the last ones of 2^23 + code; what 2^23
// adds to the product is subtracted again without an error.
__device__ __forceinline__ float times_code(uint32 codes, int j, float step_q) {
  const uint32 power = in_register(0x4b000000u);  // 2^23
  const uint32 one_a_byte = (j % 2 == 0 ? codes : codes >> 4) & 0x0f0f0f0fu;
  //   byte           7     6     5     4        3        2        1        0
  //   power       |  4b |  00 |  00 |  00 |
  //   one_a_byte                          |  code 6 | code 4 | code 2 | code 0 |  for even j; 7, 5, 3, 1 for odd j
  //   0x744i, i = j / 2, takes byte            7        4        4        i
  //   number                              |    4b   |   00   |   00   | code j |
  const float number = as_float(__byte_perm(one_a_byte, power, 0x7440 | j / 2));
  return __fmaf_rn(number, step_q, -(as_float(power) * step_q));
}

template <class Traits>
__device__ __forceinline__ int32 bucket_of(int element) {
  return static_cast<uint32>(element) / static_cast<uint32>(Traits::kBucketSize);
}

// (hi - lo) / 15. Multiplied with 1/15 as the sum of two numbers, which gives the same bits for every significand where
// no product is subnormal.
__device__ __forceinline__ float step_of(Bf16 lo, Bf16 hi) {
  constexpr float kInverse = 1.f / 15.f, kInverseRest = static_cast<float>(1. / 15. - kInverse);
  const float range = to_float(hi) - to_float(lo);
  if (float_bits(range) - 1u < 0x20000000u) {
    return __fdiv_rn(range, kLevels);  // below 2^-63, but not 0
  }
  return __fmaf_rn(range, kInverse, range * kInverseRest);
}

// a = g * grad_scale + (codes * step_q + lo), zero beyond the block.
template <class Traits>
__device__ __forceinline__ void accumulate(const Block<Traits>& block, float grad_scale, Elements<Traits>& a) {
  Codes codes[Traits::kChunks];
  Bf16 lo[Traits::kChunks] = {}, hi[Traits::kChunks] = {};  // of the bucket of the first element, most often of all
#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
    const int first = first_element<Traits>(c);
    load_first<Traits::kAligned>(a[c], in_global(block.grad) + first, block.numel() - first);
    codes[c] = load_codes<Traits::kAligned>(in_global(block.codes) + code_offset(first), block.numel() - first);
    if (first >= block.numel()) continue;
    lo[c] = in_global(block.bucket_lo)[bucket_of<Traits>(first)];
    hi[c] = in_global(block.bucket_hi)[bucket_of<Traits>(first)];
  }
  const auto add = [&](auto scaled) {
#pragma unroll
    for (int c = 0; c < Traits::kChunks; ++c) {
      const int first = first_element<Traits>(c);
      float lowest = to_float(lo[c]), step_q = step_of(lo[c], hi[c]);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (!Traits::kAligned && first + j >= block.numel()) continue;
        if (j > 0 && Traits::kBucketSize % kVector != 0 && first + j < block.numel()) {
          const int bucket = bucket_of<Traits>(first + j);
          lowest = to_float(in_global(block.bucket_lo)[bucket]);
          step_q = step_of(in_global(block.bucket_lo)[bucket], in_global(block.bucket_hi)[bucket]);
        }
        a[c][j] = scaled(a[c][j]) + (times_code(codes[c].words[j / 8], j % 8, step_q) + lowest);
      }
    }
  };
  if (grad_scale == 1.f) {
    add([](float g) { return g; });
  } else {
    add([=](float g) { return g * grad_scale; });
  }
}

// A bucket's stored range, and 15 / (hi - lo), 0 where that is not finite.
struct Range {
  Bf16 lo, hi;
  float lowest, inverse;
};

// From the bounds of a bucket, bf16, the lower one in the lower half.
__device__ __forceinline__ Range make_range(uint32 pair) {
  Range range;
  range.lo.bits = static_cast<uint16>(pair);
  range.hi.bits = static_cast<uint16>(pair >> 16);
  range.lowest = to_float(range.lo);
  range.inverse = __fdiv_rn(kLevels, to_float(range.hi) - range.lowest);
  if (float_bits(range.inverse) >= kInfBits) range.inverse = 0.f;
  return range;
}

// rint((a - lo) * (15 / (hi - lo))), or any negative number if it is negative: the bits of a subnormal number count in
// steps of the smallest one.
__device__ __forceinline__ int32 level_of(float a, const Range& range) {
  const float scaled = (a - range.lowest) * range.inverse;
  return static_cast<int32>(float_bits(scaled * as_float(1u)));
}

// Encodes chunk c of all threads, where kBucketsFitWarps.
template <class Traits>
__device__ __forceinline__ void encode_chunk(const Block<Traits>& block, int c, const float (&a)[kVector]) {
  const int first = first_element<Traits>(c), count = block.numel() - first;
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
  if (count <= 0) return;
  const Range range = make_range(bounds ^ 0x80000000u);
  Codes codes = {};
#pragma unroll
  for (int j = kVector - 2; j >= 0; j -= 2) {
    uint32& word = codes.words[j / 8];
    word = put_first(word, level_of(a[j], range), level_of(a[j + 1], range));
  }
  store_codes<Traits::kAligned>(in_global(block.codes) + code_offset(first), codes, count);
  if (static_cast<uint32>(first) % static_cast<uint32>(Traits::kBucketSize) == 0) {
    in_global(block.bucket_lo)[bucket_of<Traits>(first)] = range.lo;
    in_global(block.bucket_hi)[bucket_of<Traits>(first)] = range.hi;
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
__device__ __forceinline__ void encode_any(const Block<Traits>& block, const Elements<Traits>& a, Shared<Traits>& s) {
  constexpr int kAtOnce = Traits::kSection / 2;
  int32* const low = reinterpret_cast<int32*>(s.update);
  int32* const high = low + kAtOnce;
  Codes codes[Traits::kChunks] = {};
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
      const Range range = make_range(bf16_pair(from_ordered(low[i]), from_ordered(high[i])));
      in_global(block.bucket_lo)[first_bucket + i] = range.lo;
      in_global(block.bucket_hi)[first_bucket + i] = range.hi;
    }
#pragma unroll
    for (int c = 0; c < Traits::kChunks; ++c) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const int bucket = bucket_of<Traits>(first_element<Traits>(c) + j) - first_bucket;
        if (first_element<Traits>(c) + j >= block.numel() || bucket < 0 || bucket >= count) continue;
        const Range range = make_range(bf16_pair(from_ordered(low[bucket]), from_ordered(high[bucket])));
        codes[c].words[j / 8] |= put_first(0, level_of(a[c][j], range), 0) << (4 * (j % 8));
      }
    }
  }
#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
    const int first = first_element<Traits>(c);
    if (first < block.numel())
      store_codes<Traits::kAligned>(in_global(block.codes) + code_offset(first), codes[c], block.numel() - first);
  }
}

}  // namespace microadam
