// Types, and the few instructions that CUDA C++ has no portable name for.
//
// The kernels are compiled by NVRTC, where no header is at hand, and for tests by a C++ compiler, where
// `harness/cuda.h` stands in for the GPU.
#pragma once

#ifdef MICROADAM_HARNESS
#include "harness/cuda.h"
#endif

namespace microadam {

using uint8 = unsigned char;
using uint16 = unsigned short;
using int32 = int;
using uint32 = unsigned int;
using int64 = long long;
using Fp32 = float;

struct Bf16 {
  uint16 bits;
};
struct Fp16 {
  uint16 bits;
};

constexpr int kWarp = 32;
constexpr uint32 kFullWarp = 0xffffffffu;
constexpr uint32 kInfBits = 0x7f800000u;

__device__ __forceinline__ float as_float(uint32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32 float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bf16 x) { return as_float(static_cast<uint32>(x.bits) << 16); }

#ifndef MICROADAM_HARNESS

__device__ __forceinline__ float to_float(Fp16 x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}

// Two numbers rounded to bf16, the first in the lower half.
__device__ __forceinline__ uint32 bf16_pair(float low, float high) {
  uint32 result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

__device__ __forceinline__ uint16 fp16_bits(float x) {
  uint16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(x));
  return result;
}

// A constant that an instruction gets from a register, because another one is in its own bits.
__device__ __forceinline__ uint32 in_register(uint32 x) {
  asm("mov.b32 %0, %0;" : "+r"(x));
  return x;
}

// A byte for each half of two words, of `low` first: 0xff where it is negative, else 0.
//
//   byte        7      6      5      4      3      2      1      0
//   high     | sign 3      | sign 2      |
//   low                                  | sign 1      | sign 0      |
//   0xfdb9 takes byte                       7      5      3      1     as 8 | byte, which is its sign eight times
__device__ __forceinline__ uint32 signs_of_halves(uint32 low, uint32 high) {
  uint32 result;
  asm("prmt.b32 %0, %1, %2, 0xfdb9;" : "=r"(result) : "r"(low), "r"(high));
  return result;
}

// Two codes of 2, 4 or 8 bits before those that are there: `first`, clipped to what they hold, in the lowest bits, then
// `second`.
template <int kBits>
__device__ __forceinline__ uint32 put_first(uint32 codes, int32 first, int32 second) {
  uint32 result;
  if constexpr (kBits == 2) {
    asm("cvt.pack.sat.u2.s32.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(second), "r"(first), "r"(codes));
  } else if constexpr (kBits == 4) {
    asm("cvt.pack.sat.u4.s32.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(second), "r"(first), "r"(codes));
  } else {
    asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(second), "r"(first), "r"(codes));
  }
  return result;
}

// x plus that of the lane `distance` before, if there is one.
__device__ __forceinline__ uint32 add_from_lane_before(uint32 x, int distance) {
  asm volatile(
      "{\n"
      "  .reg .pred is_there;\n"
      "  .reg .u32 other;\n"
      "  shfl.sync.up.b32 other|is_there, %0, %1, 0, 0xffffffff;\n"
      "  @is_there add.u32 %0, %0, other;\n"
      "}"
      : "+r"(x)
      : "r"(distance));
  return x;
}

// The number of the highest bit that is set; for 0 there is none.
__device__ __forceinline__ int highest_bit(uint32 x) {
  int result;
  asm("bfind.u32 %0, %1;" : "=r"(result) : "r"(x));
  return result;
}

// Where something lies in shared memory, and the counter that lies there: it is increased.
__device__ __forceinline__ uint32 shared_address(const void* p) {
  return static_cast<uint32>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void count_at(uint32 address) {
  asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(address) : "memory");
}

// 32 bytes on their way to shared memory, where this thread finds them after wait_for_copies().
__device__ __forceinline__ void copy_ahead(void* to, const void* from) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;\n"
      "cp.async.cg.shared.global [%0+16], [%1+16], 16;" ::"r"(shared_address(to)),
      "l"(from)
      : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A barrier among `count` threads, a multiple of 32, that are beside the others.
__device__ __forceinline__ void sync_threads_beside(int count) {
  asm volatile("bar.sync 1, %0;" ::"r"(count) : "memory");
}

// The smaller and the larger of two pairs of bf16 numbers, -0 below +0; NaN only if both are.
__device__ __forceinline__ uint32 min_pair(uint32 a, uint32 b) {
  uint32 result;
  asm("min.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
__device__ __forceinline__ uint32 max_pair(uint32 a, uint32 b) {
  uint32 result;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// NaN if there is one.
__device__ __forceinline__ uint32 max_pair_or_nan(uint32 a, uint32 b) {
  uint32 result;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

#endif

// The sum over the lanes of a warp up to this one.
__device__ __forceinline__ uint32 sum_up_to_lane(uint32 x) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) x = add_from_lane_before(x, distance);
  return x;
}

// The compiler cannot know where a pointer leads that lay in shared memory.
template <class T>
__device__ __forceinline__ T* in_global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

__device__ __forceinline__ uint16 bf16_bits(float x) { return static_cast<uint16>(bf16_pair(x, 0.f)); }

__device__ __forceinline__ void round_to(float* p, float x) { *p = x; }
__device__ __forceinline__ void round_to(Bf16* p, float x) { p->bits = bf16_bits(x); }
__device__ __forceinline__ void round_to(Fp16* p, float x) { p->bits = fp16_bits(x); }

}  // namespace microadam
