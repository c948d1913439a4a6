// Loops over arrays whose length is no multiple of the vector length. Needs a simd_*.h before it.
#pragma once

#include "kernel.h"

namespace microadam {
namespace {

constexpr int kTileVectors = kTile / kLanes;

// For loops over single entries: a quarter of their time was the loop itself.
#define MICROADAM_UNROLL _Pragma("GCC unroll 4")

// The first `count` < kLanes elements and zeros.
template <class T>
inline Floats load_first(const T* from, int count) {
  T padded[kLanes] = {};
  memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_first(T* to, int count, Floats x) {
  T padded[kLanes];
  store(padded, x);
  memcpy(to, padded, static_cast<size_t>(count) * sizeof(T));
}

// to[i] = f(from[i]); `to` may be `from`.
template <class To, class From, class F>
inline void transform(To* to, const From* from, int numel, const F& f) {
  int i = 0;
  for (; i + kLanes <= numel; i += kLanes) store(to + i, f(load(from + i)));
  for (; i < numel; ++i) {
    float result[kLanes];
    store(result, f(splat(to_float(from[i]))));
    round_to(to + i, result[0]);
  }
}

// Converts fp32, bf16 and fp16 into each other.
template <class To, class From>
inline void convert(To* to, const From* from, int numel) {
  transform(to, from, numel, [](Floats x) { return x; });
}

// ---- asking for memory before it is needed, so that it does not wait for arithmetic nor arithmetic for it
//
// The weights are asked for in equal portions while the accumulator is computed and searched, the next block's gradient
// while the residual is quantized: many requests at once would fill the miss buffers and stop ordinary loads. For the
// same reason they go to the second-level cache. (Zen 4, 1 % kept of 4096 fp32, cycles per element: no prefetch 3.3, to
// the first level 3.4, to the second 2.65, in equal portions 2.35.)

constexpr int64_t kCacheLine = 64;

inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// The address `nbytes` on; it may lie outside of the tensor.
inline const void* following(const void* address, int64_t nbytes) {
  return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(address) + static_cast<uintptr_t>(nbytes));
}

// Asks for one half of an array in equal portions, one for each tile of a block.
struct Prefetcher {
  uintptr_t next;
  uintptr_t portion;  // bytes; one or two cache lines

  void ask() {
    __builtin_prefetch(reinterpret_cast<const void*>(next), 0, 2);
    __builtin_prefetch(reinterpret_cast<const void*>(next + portion / 2), 0, 2);
    next += portion;
  }
};

inline Prefetcher prefetch_half(const void* array, int64_t element_bytes, int64_t numel, int half) {
  return {reinterpret_cast<uintptr_t>(array) + static_cast<uintptr_t>(half * numel * element_bytes / 2),
          static_cast<uintptr_t>(kTile * element_bytes / 2)};
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline int round_up(int numel, int multiple) { return (numel + multiple - 1) / multiple * multiple; }

}  // namespace
}  // namespace microadam
