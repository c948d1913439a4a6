// The error feedback: a = g * grad_scale + (codes * step_q + lo), and the residual quantized again.
#pragma once

#include "block.cuh"

namespace microadam {

constexpr float kLevels = 15.f;

// Code number j of eight as a number: its bits become the last ones of a mantissa.
__device__ __forceinline__ float code_at(uint32 codes, int j) {
  const uint32 half = j < 4 ? codes : codes >> 16;
  const uint32 power = (150u - 4 * (j % 4)) << 23;  // 2^(23 - 4 (j % 4)), whose last bit j % 4 nibbles up is worth 1
  return as_float((half & (15u << (4 * (j % 4)))) | power) - as_float(power);
}

// a = g * grad_scale + (codes * step_q + lo), zero beyond the block.
template <bool kAligned>
__device__ __forceinline__ void accumulate(const Block& block, float grad_scale,
                                           float (&a)[kChunks][kVector]) {
  uint32 codes[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int first = first_element(c);
    load_first<kAligned>(a[c], in_global(block.grad) + first, block.numel - first);
    codes[c] = load_codes<kAligned>(in_global(block.codes) + first / 2, block.numel - first);
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int first = first_element(c);
    if (first >= block.numel) continue;
    float lo = 0.f, step_q = 0.f;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (!kAligned && first + j >= block.numel) continue;
      if (j == 0 || kBucketSize % kVector != 0) {
        const int bucket = (first + j) / kBucketSize;
        lo = to_float(in_global(block.bucket_lo)[bucket]);
        step_q = __fdiv_rn(to_float(in_global(block.bucket_hi)[bucket]) - lo, kLevels);
      }
      a[c][j] = a[c][j] * grad_scale + (code_at(codes[c], j) * step_q + lo);
    }
  }
}

// A bucket's stored range, and 15 / (hi - lo), 0 where that is not finite.
struct Range {
  Bf16 lo, hi;
  float lowest, inverse;
};

__device__ __forceinline__ Range make_range(float low, float high) {
  const uint32 pair = bf16_pair(low, high);
  Range range;
  range.lo.bits = static_cast<uint16>(pair);
  range.hi.bits = static_cast<uint16>(pair >> 16);
  range.lowest = to_float(range.lo);
  range.inverse = __fdiv_rn(kLevels, to_float(range.hi) - range.lowest);
  if (float_bits(range.inverse) >= kInfBits) range.inverse = 0.f;
  return range;
}

// A number whose last bits are clip(rint((a - lo) * (15 / (hi - lo))), 0, 15), and kCodeBits above them.
constexpr uint32 kCodeBits = 0x4b400000u;  // 1.5 * 2^23, whose last bit is worth 1
__device__ __forceinline__ uint32 code_of(float a, const Range& range) {
  const float scaled = (a - range.lowest) * range.inverse;
  return float_bits(fminf(fmaxf(scaled, 0.f), kLevels) + as_float(kCodeBits));
}

// Whether a bucket lies in the same chunk of one thread or of neighbouring threads of a warp.
__device__ __forceinline__ bool buckets_fit_warps() {
  return kBucketSize % kVector == 0 && kBucketSize <= 32 * kVector && (kBucketSize & (kBucketSize - 1)) == 0;
}

// Encodes chunk c of all threads, where buckets_fit_warps().
template <bool kAligned>
__device__ __forceinline__ void encode_chunk(const Block& block, int c, const float (&a)[kVector]) {
  const int first = first_element(c), count = block.numel - first;
  float low = as_float(kInfBits), high = -low;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (kAligned ? count > 0 : j < count) {
      low = fminf(low, a[j]);
      high = fmaxf(high, a[j]);
    }
  }
#pragma unroll
  for (int distance = 1; distance * kVector < kBucketSize; distance *= 2) {
    low = fminf(low, __shfl_xor_sync(kFullWarp, low, distance));
    high = fmaxf(high, __shfl_xor_sync(kFullWarp, high, distance));
  }
  if (count <= 0) return;
  const Range range = make_range(low, high);
  uint32 codes = 0;
#pragma unroll
  for (int j = kVector - 1; j >= 0; --j) codes = codes * 16u + code_of(a[j], range);
  codes -= kCodeBits * 0x11111111u;  // what is above the four bits of each, modulo 2^32
  store_codes<kAligned>(in_global(block.codes) + first / 2, codes, count);
  if (first % kBucketSize == 0) {
    in_global(block.bucket_lo)[first / kBucketSize] = range.lo;
    in_global(block.bucket_hi)[first / kBucketSize] = range.hi;
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

// Encodes the block for any other bucket size, up to kSection buckets at a time. The sums are no longer needed.
template <bool kAligned>
__device__ __forceinline__ void encode_any(const Block& block, const float (&a)[kChunks][kVector],
                                           Shared& s) {
  int32* const low = reinterpret_cast<int32*>(s.m_sums);
  int32* const high = reinterpret_cast<int32*>(s.v_sums);
  uint32 codes[kChunks] = {};
  const int num_buckets = (block.numel + kBucketSize - 1) / kBucketSize;
  for (int first_bucket = 0; first_bucket < num_buckets; first_bucket += kSection) {
    const int count = min(num_buckets - first_bucket, kSection);
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads) {
      low[i] = 0x7fffffff;
      high[i] = -0x7fffffff - 1;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const int bucket = (first_element(c) + j) / kBucketSize - first_bucket;
        if (first_element(c) + j >= block.numel || bucket < 0 || bucket >= count) continue;
        atomicMin(&low[bucket], ordered(a[c][j]));
        atomicMax(&high[bucket], ordered(a[c][j]));
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const Range range = make_range(from_ordered(low[i]), from_ordered(high[i]));
      in_global(block.bucket_lo)[first_bucket + i] = range.lo;
      in_global(block.bucket_hi)[first_bucket + i] = range.hi;
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const int bucket = (first_element(c) + j) / kBucketSize - first_bucket;
        if (first_element(c) + j >= block.numel || bucket < 0 || bucket >= count) continue;
        const Range range = make_range(from_ordered(low[bucket]), from_ordered(high[bucket]));
        codes[c] |= (code_of(a[c][j], range) & 15u) << (4 * j);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int first = first_element(c);
    if (first < block.numel) store_codes<kAligned>(in_global(block.codes) + first / 2, codes[c], block.numel - first);
  }
}

}  // namespace microadam
