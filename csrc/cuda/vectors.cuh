// Eight neighbouring numbers, the unit in which a thread reads and writes: with vector accesses (kAligned), or one by
// one where a block begins at an odd place or its length is no multiple of 8.
#pragma once

#include "device.cuh"

namespace microadam {

constexpr int kVector = 8;

// Eight numbers as they lie in memory.
template <class T>
struct Vector {
  uint4 words[sizeof(T) / 2];
};

__device__ __forceinline__ uint32 word(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

__device__ __forceinline__ void unpack(float (&x)[kVector], const Vector<float>& from) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) x[j] = as_float(word(from.words[j / 4], j % 4));
}

__device__ __forceinline__ void unpack(float (&x)[kVector], const Vector<Bf16>& from) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = as_float(word(from.words[0], i) << 16);
    x[2 * i + 1] = as_float(word(from.words[0], i) & 0xffff0000u);
  }
}

__device__ __forceinline__ void unpack(float (&x)[kVector], const Vector<Fp16>& from) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = to_float(Fp16{static_cast<uint16>(word(from.words[0], i))});
    x[2 * i + 1] = to_float(Fp16{static_cast<uint16>(word(from.words[0], i) >> 16)});
  }
}

template <class T>
__device__ __forceinline__ void load_vector(float (&x)[kVector], const T* p) {
  unpack(x, *reinterpret_cast<const Vector<T>*>(p));
}

__device__ __forceinline__ void store_vector(float* p, const float (&x)[kVector]) {
  reinterpret_cast<float4*>(p)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(p)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ void store_vector(Bf16* p, const float (&x)[kVector]) {
  *reinterpret_cast<uint4*>(p) =
      make_uint4(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]), bf16_pair(x[4], x[5]), bf16_pair(x[6], x[7]));
}

__device__ __forceinline__ void store_vector(Fp16* p, const float (&x)[kVector]) {
  uint32 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = fp16_bits(x[2 * i]) | static_cast<uint32>(fp16_bits(x[2 * i + 1])) << 16;
  *reinterpret_cast<uint4*>(p) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// The first `count` numbers, zeros for the rest; kAligned: all of them or none.
template <bool kAligned, class T>
__device__ __forceinline__ void load_first(float (&x)[kVector], const T* p, int count) {
  if constexpr (kAligned) {
    Vector<T> vector = {};
    if (count > 0) vector = *reinterpret_cast<const Vector<T>*>(p);
    unpack(x, vector);
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) x[j] = j < count ? to_float(p[j]) : 0.f;
  }
}

template <bool kAligned, class T>
__device__ __forceinline__ void store_first(T* p, const float (&x)[kVector], int count) {
  if constexpr (kAligned) {
    store_vector(p, x);
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (j < count) round_to(p + j, x[j]);
    }
  }
}

// Eight codes of 4 bits.
template <bool kAligned>
__device__ __forceinline__ uint32 load_codes(const uint8* p, int count) {
  uint32 codes = 0;
  if constexpr (kAligned) {
    if (count > 0) codes = *reinterpret_cast<const uint32*>(p);
  } else {
    for (int i = 0; 2 * i < count && i < 4; ++i) codes |= static_cast<uint32>(p[i]) << (8 * i);
  }
  return codes;
}

template <bool kAligned>
__device__ __forceinline__ void store_codes(uint8* p, uint32 codes, int count) {
  if constexpr (kAligned) {
    *reinterpret_cast<uint32*>(p) = codes;
  } else {
    if (count < kVector) codes &= (1u << (4 * count)) - 1u;
    for (int i = 0; 2 * i < count && i < 4; ++i) p[i] = static_cast<uint8>(codes >> (8 * i));
  }
}

}  // namespace microadam
