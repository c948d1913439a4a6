// Stands in for the GPU: the CUDA names the kernels use, for a C++ compiler. One fiber a CUDA thread.
//
// Fibers switch only where CUDA threads wait for each other, so everything is deterministic. A missing barrier shows as
// a wrong result, when not in the order of the threads then in the reverse one. Shared memory is full of garbage at the
// start of every block. Atomics are plain: only one fiber runs at a time.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __restrict__

struct Dim3 {
  unsigned x;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace harness {

extern Dim3 thread, block;

// Waits for the other members of a group: the block, one warp, or its first threads.
void wait_for_block();
void wait_for_warp();
void wait_for_first(int count);
// What lane `source` of this warp gave in the same call.
unsigned exchange(unsigned value, unsigned source);
unsigned lane();

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
inline T shuffle(T value, unsigned source) {
  return bit_cast<T>(exchange(bit_cast<unsigned>(value), source));
}

}  // namespace harness

#define threadIdx harness::thread
#define blockIdx harness::block

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned x) { return harness::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return harness::bit_cast<unsigned>(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
#define __builtin_assume(condition)
inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <class A, class B>
inline auto min(A a, B b) -> decltype(a + b) {
  return a < b ? a : b;
}

inline void __syncthreads() { harness::wait_for_block(); }

template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
  return harness::shuffle(value, harness::lane() ^ mask);
}
template <class T>
inline T __shfl_up_sync(unsigned, T value, unsigned distance) {
  return harness::shuffle(value, harness::lane() < distance ? harness::lane() : harness::lane() - distance);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(mask, value, distance);
  return value;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const unsigned other = __shfl_xor_sync(mask, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

template <class T>
inline T atomicAdd(T* p, T x) {
  const T old = *p;
  *p += x;
  return old;
}
template <class T>
inline T atomicMin(T* p, T x) {
  const T old = *p;
  *p = old < x ? old : x;
  return old;
}
template <class T>
inline T atomicMax(T* p, T x) {
  const T old = *p;
  *p = old > x ? old : x;
  return old;
}
template <class T>
inline T atomicExch(T* p, T x) {
  const T old = *p;
  *p = x;
  return old;
}

template <class A, class B>
inline auto max(A a, B b) -> decltype(a + b) {
  return a > b ? a : b;
}

namespace microadam {

struct Fp16;

inline float max_or_nan(float a, float b) { return isnan(a) || isnan(b) ? NAN : a > b ? a : b; }
inline unsigned add_from_lane_before(unsigned x, int distance) {
  const unsigned other = __shfl_up_sync(0, x, distance);
  return harness::lane() < static_cast<unsigned>(distance) ? x : x + other;
}
inline unsigned in_register(unsigned x) { return x; }
inline unsigned put_first(unsigned codes, int first, int second) {
  return codes << 8 | min(max(second, 0), 15) << 4 | min(max(first, 0), 15);
}
inline void sync_first_threads(int count) { harness::wait_for_first(count); }

inline unsigned short round_to_bf16(float x) {
  if (isnan(x)) return 0x7fff;  // as the instruction
  const unsigned bits = __float_as_uint(x);
  return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline unsigned bf16_pair(float low, float high) { return round_to_bf16(low) | round_to_bf16(high) << 16; }
inline unsigned short fp16_bits(float x) { return harness::bit_cast<unsigned short>(static_cast<_Float16>(x)); }
float to_float(Fp16 x);

}  // namespace microadam
