// Sixteen neighbouring numbers, the unit in which a thread reads and writes: with vector accesses (kAligned), or one by
// one where a block begins at an odd place or its length is no multiple of 16.
#pragma once

#include "device.cuh"

namespace microadam {

constexpr int kVector = 16;

// Sixteen numbers as they lie in memory.
template <class T>
struct Vector {
  uint4 words[sizeof(T)];
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
  for (int i = 0; i < kVector / 2; ++i) {
    x[2 * i] = as_float(word(from.words[i / 4], i % 4) << 16);
    x[2 * i + 1] = as_float(word(from.words[i / 4], i % 4) & 0xffff0000u);
  }
}

__device__ __forceinline__ void unpack(float (&x)[kVector], const Vector<Fp16>& from) {
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    x[2 * i] = to_float(Fp16{static_cast<uint16>(word(from.words[i / 4], i % 4))});
    x[2 * i + 1] = to_float(Fp16{static_cast<uint16>(word(from.words[i / 4], i % 4) >> 16)});
  }
}

__device__ __forceinline__ void store_vector(float* p, const float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; i += 4) {
    reinterpret_cast<float4*>(p)[i / 4] = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  }
}

// Pairs of 16-bit numbers.
template <class T>
__device__ __forceinline__ void store_pairs(T* p, const uint32 (&pairs)[kVector / 2]) {
#pragma unroll
  for (int i = 0; i < kVector / 2; i += 4) {
    reinterpret_cast<uint4*>(p)[i / 4] = make_uint4(pairs[i], pairs[i + 1], pairs[i + 2], pairs[i + 3]);
  }
}

__device__ __forceinline__ void store_vector(Bf16* p, const float (&x)[kVector]) {
  uint32 pairs[kVector / 2];
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) pairs[i] = bf16_pair(x[2 * i], x[2 * i + 1]);
  store_pairs(p, pairs);
}

__device__ __forceinline__ void store_vector(Fp16* p, const float (&x)[kVector]) {
  uint32 pairs[kVector / 2];
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    pairs[i] = fp16_bits(x[2 * i]) | static_cast<uint32>(fp16_bits(x[2 * i + 1])) << 16;
  }
  store_pairs(p, pairs);
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

}  // namespace microadam
