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
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace harness {

extern Dim3 thread, block;
extern char* shared_memory;

// Waits for the other members of a group: the block, one warp, or `count` threads.
void wait_for_block();
void wait_for_warp();
void wait_for(int count);
// What the lanes of this warp gave in the same call, until done_with_lanes() is called.
const unsigned* from_lanes(unsigned value);
void done_with_lanes();
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
  const unsigned result = from_lanes(bit_cast<unsigned>(value))[source];
  done_with_lanes();
  return bit_cast<T>(result);
}

// x = f(x, value of each lane).
template <class F>
inline unsigned over_lanes(unsigned value, unsigned x, const F& f) {
  const unsigned* const values = from_lanes(value);
  for (unsigned i = 0; i < 32; ++i) x = f(x, values[i]);
  done_with_lanes();
  return x;
}

}  // namespace harness

#define threadIdx harness::thread
#define blockIdx harness::block

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
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
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 0xff) * (b >> i & 0xff);
  return c;
}

template <class A, class B>
inline auto min(A a, B b) -> decltype(a + b) {
  return a < b ? a : b;
}

inline void __syncthreads() { harness::wait_for_block(); }
inline void __syncwarp() { harness::wait_for_warp(); }

template <class T>
inline T __shfl_sync(unsigned, T value, int source) {
  return harness::shuffle(value, source);
}

template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
  return harness::shuffle(value, harness::lane() ^ mask);
}
template <class T>
inline T __shfl_up_sync(unsigned, T value, unsigned distance) {
  return harness::shuffle(value, harness::lane() < distance ? harness::lane() : harness::lane() - distance);
}
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  return harness::over_lanes(value, 0, [](unsigned x, unsigned other) { return x + other; });
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return harness::over_lanes(value, 0, [](unsigned x, unsigned other) { return x > other ? x : other; });
}

template <class T>
inline T atomicAdd(T* p, T x) {
  const T old = *p;
  *p += x;
  return old;
}
inline unsigned atomicOr(unsigned* p, unsigned x) {
  const unsigned old = *p;
  *p |= x;
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

inline unsigned add_from_lane_before(unsigned x, int distance) {
  const unsigned other = __shfl_up_sync(0, x, distance);
  return harness::lane() < static_cast<unsigned>(distance) ? x : x + other;
}
inline unsigned in_register(unsigned x) { return x; }
inline int highest_bit(unsigned x) { return x == 0 ? -1 : 31 - __builtin_clz(x); }
inline unsigned shared_address(const void* p) {
  return static_cast<unsigned>(static_cast<const char*>(p) - harness::shared_memory);
}
inline void count_at(unsigned address) { ++*reinterpret_cast<unsigned*>(harness::shared_memory + address); }
inline void copy_ahead(void* to, const void* from) { memcpy(to, from, 32); }
inline void wait_for_copies() {}
inline void sync_threads_beside(int count) { harness::wait_for(count); }
inline unsigned signs_of_halves(unsigned low, unsigned high) {
  const unsigned signs = __byte_perm(low, high, 0x7531) >> 7 & 0x01010101u;
  return signs * 0xffu;
}
template <int kBits>
inline unsigned put_first(unsigned codes, int first, int second) {
  constexpr int kLargest = (1 << kBits) - 1;
  return codes << 2 * kBits | min(max(second, 0), kLargest) << kBits | min(max(first, 0), kLargest);
}

inline unsigned short round_to_bf16(float x) {
  if (isnan(x)) return 0x7fff;  // as the instruction
  const unsigned bits = __float_as_uint(x);
  return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline unsigned bf16_pair(float low, float high) { return round_to_bf16(low) | round_to_bf16(high) << 16; }

// f(a, b) of each half of two words.
template <class F>
inline unsigned by_halves(unsigned a, unsigned b, const F& f) {
  return f(a & 0xffff, b & 0xffff) | f(a >> 16, b >> 16) << 16;
}
// The bits of bf16 numbers, in the order of integers.
inline int in_order(unsigned bits) {
  return bits & 0x8000 ? -static_cast<int>(bits & 0x7fff) - 1 : static_cast<int>(bits);
}
inline unsigned min_pair(unsigned a, unsigned b) {
  return by_halves(a, b, [](unsigned x, unsigned y) { return in_order(x) < in_order(y) ? x : y; });
}
inline unsigned max_pair(unsigned a, unsigned b) {
  return by_halves(a, b, [](unsigned x, unsigned y) { return in_order(x) > in_order(y) ? x : y; });
}
// For numbers that are not negative: NaN is the largest.
inline unsigned max_pair_or_nan(unsigned a, unsigned b) { return max_pair(a, b); }

inline unsigned short fp16_bits(float x) { return harness::bit_cast<unsigned short>(static_cast<_Float16>(x)); }
float to_float(Fp16 x);

}  // namespace microadam
