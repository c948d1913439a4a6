// The step on one Top-K block, the phases in the order of the algorithm, and on one piece of the dense path.
#pragma once

#include "block.cuh"
#include "error_feedback.cuh"
#include "topk.cuh"
#include "window.cuh"

namespace microadam {

template <class Traits>
__device__ __forceinline__ void skip_block(const Launch& launch, const Shared<Traits>& s) {
  if (Traits::kHasWindow) store_empty_slot(s);
  if (threadIdx.x == 0) atomicAdd(launch.num_skipped, 1);
}

// s.block and s.scalars are set, bins and sums are clear.
template <bool kAligned, class Traits>
__device__ __forceinline__ void block_step(const Launch& launch, Shared<Traits>& s) {
  Elements<Traits> a;
  stage_window(s);
  accumulate<kAligned>(s.block, s.scalars.grad_scale, a);
  __syncthreads();
  sum_slots(0, launch, s);

  Keys<Traits> packed;
  pack<Traits>(a, packed);
  Threshold threshold;
  if (!find_threshold(a, packed, s.block.numel, s.block.num_kept, &threshold, s)) {
    skip_block(launch, s);
    return;
  }
  if (Traits::kPackedWindow) find_largest(packed, s);
  Kept kept[Traits::kChunks];
  mark_kept(packed, threshold, kept, s);
  Scale scale = {};
  if (Traits::kPackedWindow) scale = store_scale(s);

#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
    if (c * Traits::kSection >= s.block.numel) break;
    if (c > 0) {
      clear_sums(s);
      __syncthreads();
      sum_slots(c, launch, s);
    }
    take_kept(c, packed[c], kept[c], scale, a[c], s);
    if constexpr (Traits::kBucketsFitWarps) encode_chunk<kAligned>(s.block, c, a[c]);
    update_slots(c, s);
    __syncthreads();
    apply_updates<kAligned>(c, s);
  }
  if constexpr (!Traits::kBucketsFitWarps) encode_any<kAligned>(s.block, a, s);
}

// The weights alone, from a window that has all its slots.
template <bool kAligned, class Traits>
__device__ __forceinline__ void replay_block(const Launch& launch, Shared<Traits>& s) {
  stage_window(s);
#pragma unroll 1
  for (int c = 0; c * Traits::kSection < s.block.numel; ++c) {
    if (c > 0) clear_sums(s);
    __syncthreads();
    sum_slots(c, launch, s);
    __syncthreads();
    update_slots(c, s);
    __syncthreads();
    apply_updates<kAligned>(c, s);
  }
}

template <bool kAligned, class Traits>
__device__ __forceinline__ void sparse_step(const Launch& launch, Shared<Traits>& s) {
  if constexpr (Traits::kReplays) {
    replay_block<kAligned>(launch, s);
  } else {
    block_step<kAligned>(launch, s);
  }
}

// AdamW on kCapacity elements of the dense path, beginning with number `start` of the run:
// m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  p = p * (1 - lr*wd) - lr * (m_hat / (eps + sqrt(v_hat)))
template <class Traits>
__device__ __forceinline__ void dense_step(const Tensor& tensor, const Run& run, int64 start, const Launch& launch,
                                           const Scalars& scalars, int32* flag) {
  auto* const param = static_cast<typename Traits::Param*>(tensor.param) + run.elements.start;
  auto* const grad = static_cast<const typename Traits::Grad*>(tensor.grad) + run.elements.start;
  float* const exp_avg = tensor.exp_avg + run.values.start;
  float* const exp_avg_sq = tensor.exp_avg_sq + run.values.start;
  const int64 end = min(start + Traits::kCapacity, run.numel);
  const uint32 counter = counter_of(run.place, scalars.step_key, run.elements.start);
  bool is_finite = true;
#pragma unroll 1
  for (int64 i = start + threadIdx.x; i < end; i += Traits::kThreads) {
    const float g = to_float(grad[i]) * scalars.grad_scale;
    if (bf16_bits(fabsf(g)) < kNotFinite) {
      const float m = exp_avg[i] * scalars.beta1 + g * scalars.one_minus_beta1;
      const float v = exp_avg_sq[i] * scalars.beta2 + (g * g) * scalars.one_minus_beta2;
      const float update = adam_update(m * scalars.m_correction, v * scalars.v_correction, scalars);
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
      const float weight = to_float(param[i]) * scalars.decay - update;
      if constexpr (Traits::kStochastic) {
        round_to(param + i, weight, counter + static_cast<uint32>(i) * kPositionFactor);
      } else {
        round_to(param + i, weight);
      }
    } else {
      is_finite = false;
    }
  }
  if (!is_finite && atomicExch(flag, 1) == 0) atomicAdd(launch.num_skipped, 1);
}

// What thread block number `index` of a launch does.
template <class Traits>
__device__ __forceinline__ void step(const Launch& launch, uint32 index, Shared<Traits>& s) {
  uint32 number = launch.first_runs[index >> kRunShift];
  while (launch.runs[number + 1].first_block <= index) ++number;
  const Run& run = launch.runs[number];
  const Tensor& tensor = launch.tensors[run.tensor];
  const uint32 index_in_run = index - static_cast<uint32>(run.first_block);
  if (threadIdx.x == 0) {
    s.scalars = launch.device_scalars == nullptr ? launch.scalars : launch.device_scalars[run.tensor];
    if (run.num_kept != 0) s.block = find_block<Traits>(tensor, run, index_in_run, s.scalars);
  }
  clear_bins(s);
  clear_sums(s);
  __syncthreads();
  if (s.scalars.is_skipped) return;
  if (run.num_kept == 0) {
    if (Traits::kReplays) return;
    const int64 start = static_cast<int64>(index_in_run) * Traits::kCapacity;
    dense_step<Traits>(tensor, run, start, launch, s.scalars, launch.dense_flags + number);
  } else if (run.is_aligned && tensor.is_aligned) {
    sparse_step<true>(launch, s);
  } else {
    sparse_step<false>(launch, s);
  }
}

}  // namespace microadam
