// The step on one Top-K block, the phases in the order of the algorithm, and on one piece of the dense path.
#pragma once

#include "block.cuh"
#include "error_feedback.cuh"
#include "topk.cuh"
#include "window.cuh"

namespace microadam {

template <class Traits>
__device__ __forceinline__ void skip_block(const Launch& launch, const Shared<Traits>& s) {
  if (Traits::kCopiesAhead) wait_for_copies();
  if (Traits::kHasWindow) store_empty_slot(s);
  if (threadIdx.x == 0) atomicAdd(launch.num_skipped, 1);
}

// s.block and s.scalars are set, bins and sums are clear. The whole block finds the threshold; from there on each warp
// goes on alone, group by group.
template <class Traits>
__device__ __forceinline__ void block_step(const Launch& launch, Shared<Traits>& s) {
  Elements<Traits> a;
  stage_window(s);
  accumulate(s.block, s.scalars.grad_scale, a);
  copy_weights_ahead(s);
  Keys<Traits> keys;
  take_keys(a, keys, s);
  Threshold threshold;
  const auto beside_rank = [&] { sum_slots(0, Traits::kWarps == 1 ? 0 : kWarp, launch, s); };
  if (!find_threshold(keys, s.block.numel(), s.block.num_kept(), &threshold, s, beside_rank)) {
    skip_block(launch, s);
    return;
  }
  if (Traits::kPackedWindow) find_largest(keys, s);
  Kept kept[Traits::kChunks];
  mark_kept(keys, threshold, kept, s);
  Scale scale = {};
  if (Traits::kPackedWindow) scale = store_scale(s);

#pragma unroll
  for (int c = 0; c < Traits::kChunks; ++c) {
    if (c * Traits::kSection >= s.block.numel()) break;
    if (c > 0) sum_section(c, launch, s);
    take_kept(kept[c], scale, a[c], s);
    if constexpr (Traits::kHasWindow) add_newest(c, kept[c], scale, s);
    update_group(kept[c], s);
    apply_updates(c, s);
    if constexpr (Traits::kHasError && Traits::kBucketsFitWarps) encode_chunk(c, a[c], s);
  }
  if constexpr (Traits::kPackedWindow) store_shared_bits(s);
  if constexpr (Traits::kHasError && !Traits::kBucketsFitWarps) encode_any(a, s);
}

// The weights alone, from a window that has all its slots.
template <class Traits>
__device__ __forceinline__ void replay_block(const Launch& launch, Shared<Traits>& s) {
  stage_window(s);
#pragma unroll 1
  for (int c = 0; c * Traits::kSection < s.block.numel(); ++c) {
    sum_section(c, launch, s);
    update_group(Kept(), s);
    apply_updates(c, s);
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

// Finds the run of thread block number `index`, and the block if it is one of Top-K. For one thread.
template <class Traits>
__device__ __forceinline__ void find_work(const Launch& launch, uint32 index, Shared<Traits>& s) {
  uint32 number = launch.first_runs[index >> kRunShift];
  while (launch.runs[number + 1].first_block <= index) ++number;
  const Run& run = launch.runs[number];
  const Tensor& tensor = launch.tensors[run.tensor];
  s.run = number;
  s.scalars = launch.device_scalars == nullptr ? launch.scalars : launch.device_scalars[run.tensor];
  s.is_sparse = run.num_kept != 0 && !s.scalars.is_skipped;
  s.block = find_block<Traits>(tensor, run, index - static_cast<uint32>(run.first_block), s.scalars);
}

// What thread block number `index` of a launch does.
template <class Traits>
__device__ __forceinline__ void step(const Launch& launch, uint32 index, Shared<Traits>& s) {
  if (threadIdx.x == 0) find_work(launch, index, s);
  clear_bins(s);
  clear_sums(s);
  __syncthreads();
  if (s.is_sparse) {
    if constexpr (Traits::kReplays) {
      replay_block(launch, s);
    } else {
      block_step(launch, s);
    }
  } else if (!s.scalars.is_skipped && !Traits::kReplays) {
    const Run& run = launch.runs[s.run];
    const int64 start = static_cast<int64>(index - static_cast<uint32>(run.first_block)) * Traits::kCapacity;
    dense_step<Traits>(launch.tensors[run.tensor], run, start, launch, s.scalars, launch.dense_flags + s.run);
  }
}

}  // namespace microadam
