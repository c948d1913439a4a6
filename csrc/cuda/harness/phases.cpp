// Single phases of the step, for several settings in one program, run by fibers.
#include "../error_feedback.cuh"
#include "../topk.cuh"
#include "fibers.h"

namespace {

using namespace microadam;

template <int threads, int chunks, int bucket_size, bool aligned>
struct Settings {
  using Param = Fp32;
  using Grad = Fp32;
  static constexpr bool kAligned = aligned, kReplays = false, kPackedWindow = false, kStochastic = false;
  static constexpr int kThreads = threads, kChunks = chunks, kBucketSize = bucket_size, kLevels = 15;
  static constexpr int kLength = 0, kWindowSize = 1, kMaxKept = threads * chunks * kVector;
};

// A block's elements as `accumulate` leaves them.
template <class Traits>
void load(const float* values, int numel, Elements<Traits>& a) {
  for (int c = 0; c < Traits::kChunks; ++c) {
    load_first<false>(a[c], values + first_element<Traits>(c), numel - first_element<Traits>(c));
  }
}

template <class Traits>
bool top_k(const float* values, int numel, int num_kept, int* positions, int* is_finite, bool reverse) {
  return harness::run_block<Traits>(reverse, [=](Shared<Traits>& s) {
    Elements<Traits> a;
    Keys<Traits> keys;
    load<Traits>(values, numel, a);
    clear_bins(s);
    __syncthreads();
    take_keys(a, keys, s);
    Threshold threshold;
    *is_finite = find_threshold(keys, numel, num_kept, &threshold, s, [] {});
    if (!*is_finite) return;
    Kept kept[Traits::kChunks];
    mark_kept(keys, threshold, kept, s);
    for (int c = 0; c < Traits::kChunks; ++c) {
      int position = kept[c].before + kept[c].position;
      for (int j = 0; j < kVector; ++j) {
        const int element = first_element<Traits>(c) + j;
        if (element < numel) positions[element] = kept[c].mask >> j & 1 ? position++ : -1;
      }
    }
  });
}

template <class Traits>
bool encode(const float* residual, int numel, uint8* codes, Bf16* lo, Bf16* hi, bool reverse) {
  return harness::run_block<Traits>(reverse, [=](Shared<Traits>& s) {
    Block<Traits> block = {};
    block.length = numel;
    block.codes = codes;
    block.bucket_lo = lo;
    block.bucket_hi = hi;
    if (threadIdx.x == 0) s.block = block;
    __syncthreads();
    Elements<Traits> a;
    load<Traits>(residual, numel, a);
    if constexpr (Traits::kBucketsFitWarps) {
      for (int c = 0; c < Traits::kChunks; ++c) encode_chunk(c, a[c], s);
    } else {
      encode_any(a, s);
    }
  });
}

// Calls f with the traits for these numbers. Returns -1 where they are not among those of this program.
template <bool aligned = false, class F>
int with_traits(int threads, int chunks, int bucket_size, const F& f) {
  int result = -1;
  const auto try_one = [&](auto settings) {
    using Traits = KernelTraits<decltype(settings)>;
    if (Traits::kThreads == threads && Traits::kChunks == chunks && Traits::kBucketSize == bucket_size) {
      result = f(Traits());
    }
  };
  try_one(Settings<32, 1, 64, aligned>());
  try_one(Settings<32, 3, 64, aligned>());
  try_one(Settings<64, 2, 8, aligned>());
  try_one(Settings<128, 1, 256, aligned>());
  try_one(Settings<32, 2, 6, aligned>());
  try_one(Settings<64, 1, 96, aligned>());
  return result;
}

}  // namespace

// The place of every element among those that are kept, or -1.
extern "C" int phase_top_k(int threads, int chunks, int bucket_size, const float* values, int numel, int num_kept,
                           int* positions, int* is_finite, int reverse) {
  return with_traits(threads, chunks, bucket_size, [=](auto traits) {
    return top_k<decltype(traits)>(values, numel, num_kept, positions, is_finite, reverse);
  });
}

// The residual of a block quantized; `aligned`: for vector accesses.
extern "C" int phase_encode(int threads, int chunks, int bucket_size, const float* residual, int numel, int aligned,
                            unsigned char* codes, unsigned short* lo, unsigned short* hi, int reverse) {
  const auto run = [=](auto traits) {
    return encode<decltype(traits)>(residual, numel, codes, reinterpret_cast<Bf16*>(lo), reinterpret_cast<Bf16*>(hi),
                                    reverse);
  };
  return aligned ? with_traits<true>(threads, chunks, bucket_size, run)
                 : with_traits(threads, chunks, bucket_size, run);
}
