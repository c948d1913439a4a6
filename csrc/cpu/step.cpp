// The C interface: cuts all tensors of a call into pieces of similar size and lets the threads share them.
#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "counters.h"
#include "kernel.h"
#include "microadam_cpu.h"
#include "threads.h"

namespace microadam {
namespace {

// Elements a thread takes at a time: enough that taking is free, few enough that no thread waits long for the last.
constexpr int64_t kPieceNumel = 32768;
constexpr size_t kAlignment = 64;  // of scratch buffers: a cache line, and the longest vector

// Consecutive pieces of one run, numbered through all jobs of a call.
struct Job {
  const microadam_tensor* tensor;
  const microadam_block_run* blocks;  // either this
  const microadam_dense_run* dense;   // or this
  int64_t units_per_piece;            // blocks or elements
  int64_t end;                        // number of the piece after the last
};

struct Call {
  const microadam_settings* settings;
  const Kernel* kernel;
  std::vector<Job> jobs;
  std::unique_ptr<std::atomic<bool>[]> dense_skipped;  // one flag a job: a dense run counts once
  char* scratch;
  size_t scratch_bytes;  // of one thread
  int max_numel, max_kept, max_buckets;
  std::atomic<int64_t> next_piece{0};
  std::atomic<int> next_thread{0};
  std::atomic<int64_t> num_skipped{0};
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void add_job(Call& call, const microadam_tensor& tensor, const microadam_block_run* blocks,
             const microadam_dense_run* dense, int64_t units, int64_t units_per_piece) {
  const int64_t first = call.jobs.empty() ? 0 : call.jobs.back().end;
  call.jobs.push_back({&tensor, blocks, dense, units_per_piece, first + divide_up(units, units_per_piece)});
}

void plan(Call& call, const microadam_tensor* tensors, int64_t num_tensors) {
  const int64_t bucket_size = call.settings->bucket_size;
  int64_t max_numel = 0, max_kept = 0, max_buckets = 0;
  for (const microadam_tensor* tensor = tensors; tensor != tensors + num_tensors; ++tensor) {
    const microadam_layout& layout = *tensor->layout;
    for (int64_t i = 0; i < layout.num_block_runs; ++i) {
      const microadam_block_run& run = layout.block_runs[i];
      add_job(call, *tensor, &run, nullptr, run.rows * run.cols, std::max<int64_t>(1, kPieceNumel / run.numel));
      max_numel = std::max(max_numel, run.numel);
      max_kept = std::max(max_kept, run.num_kept);
      max_buckets = std::max(max_buckets, divide_up(run.numel, bucket_size));
    }
    for (int64_t i = 0; i < layout.num_dense_runs && tensor->grad != nullptr; ++i) {
      add_job(call, *tensor, nullptr, &layout.dense_runs[i], layout.dense_runs[i].numel, kPieceNumel);
    }
  }
  call.max_numel = static_cast<int>(max_numel);
  call.max_kept = static_cast<int>(max_kept);
  call.max_buckets = static_cast<int>(max_buckets);
  call.dense_skipped.reset(new std::atomic<bool>[call.jobs.size()]());
}

// Hands out the parts of one thread's scratch memory; with a null pointer it only adds up their sizes.
class Carver {
 public:
  explicit Carver(char* memory) : memory_(memory) {}

  template <class T>
  T* take(int numel) {
    T* part = reinterpret_cast<T*>(memory_ == nullptr ? nullptr : memory_ + used_);
    used_ += divide_up((numel + kPad) * sizeof(T), kAlignment) * kAlignment;
    return part;
  }

  size_t used() const { return used_; }
  void go_to(size_t position) { used_ = position; }

 private:
  char* memory_;
  size_t used_ = 0;
};

Scratch carve(const Call& call, Carver& carver) {
  Scratch s;
  s.accumulator = carver.take<float>(call.max_numel);
  s.moments = carver.take<Moments>(call.max_numel);
  s.indices = carver.take<uint16_t>(call.max_kept);
  s.values = carver.take<Bf16>(call.max_kept);
  s.last_key = carver.take<uint32_t>(1);
  s.bucket_lo = carver.take<float>(call.max_buckets);
  s.bucket_factor = carver.take<float>(call.max_buckets);
  s.codes = carver.take<uint8_t>(call.max_numel);

  // The selection and the update of the weights share memory.
  const size_t shared = carver.used();
  s.maxima = carver.take<uint32_t>(call.max_numel / kGroup);
  s.candidates = carver.take<uint16_t>(call.max_numel);
  s.candidate_bits = carver.take<uint32_t>(call.max_numel);
  const size_t end = carver.used();
  carver.go_to(shared);
  const int max_entries = call.max_kept * static_cast<int>(call.settings->window_size);
  s.terms = carver.take<Moments>(call.max_kept);
  s.sums = carver.take<Moments>(max_entries);
  s.weights = carver.take<uint16_t>(max_entries);
  const bool is_packed = call.settings->packed_window != 0;
  s.unpacked_indices = carver.take<uint16_t>(is_packed ? max_entries : 0);
  s.unpacked_values = carver.take<float>(is_packed ? call.max_kept : 0);
  carver.go_to(std::max(end, carver.used()));
  return s;
}

template <class T>
T* at(T* base, int64_t offset) {
  return base == nullptr ? nullptr : base + offset;
}

template <class T>
T* at_element(T* base, int64_t dtype, int64_t offset) {
  return reinterpret_cast<T*>((uintptr_t)base + static_cast<uintptr_t>(offset * element_bytes(dtype)));
}

Bf16* bf16(uint16_t* x) { return reinterpret_cast<Bf16*>(x); }

uint32_t counter_of(const microadam_tensor& tensor, const microadam_place& place, int64_t element) {
  return first_counter(place.origin + element, tensor.scalars->step_key, place.shape_key);
}

Block locate(const microadam_tensor& tensor, const microadam_block_run& run, int64_t index, int64_t window_size) {
  const int64_t row = index / run.cols, col = index % run.cols;
  const auto begin = [=](const microadam_extent& e) { return e.start + row * e.row_stride + col * e.size; };
  const int64_t element = begin(run.elements);
  const int64_t value_bytes = tensor.scales == nullptr ? sizeof(Bf16) : sizeof(int8_t);
  Block block;
  block.param = at_element(tensor.param, tensor.param_dtype, element);
  block.grad = tensor.grad == nullptr ? nullptr : at_element(tensor.grad, tensor.grad_dtype, element);
  block.codes = at(tensor.codes, begin(run.codes));
  block.bucket_lo = at(bf16(tensor.bucket_lo), begin(run.buckets));
  block.bucket_hi = at(bf16(tensor.bucket_hi), begin(run.buckets));
  block.bucket_scale = at(bf16(tensor.bucket_scale), begin(run.buckets));
  block.indices = at(tensor.indices, window_size * begin(run.indices));
  block.values = at(tensor.values, window_size * begin(run.values) * value_bytes);
  block.scales = at(bf16(tensor.scales), window_size * begin(run.scales));
  block.numel = static_cast<int>(run.numel);
  block.num_kept = static_cast<int>(run.num_kept);
  block.index_bytes = static_cast<int>(run.indices.size);
  block.value_bytes = static_cast<int>(run.values.size * value_bytes);
  block.counter = counter_of(tensor, run.place, element);
  return block;
}

void run_blocks(Call& call, const Job& job, int64_t first, const Step& step, const Scratch& scratch) {
  const int64_t num_blocks = job.blocks->rows * job.blocks->cols;
  const int64_t end = std::min(first + job.units_per_piece, num_blocks);
  int64_t num_skipped = 0;
  for (int64_t index = first; index < end; ++index) {
    const Block block = locate(*job.tensor, *job.blocks, index, step.window_size);
    num_skipped += !call.kernel->block_step(block, step, scratch);
  }
  if (num_skipped != 0) call.num_skipped += num_skipped;
}

void run_dense(Call& call, const Job& job, int64_t first, const Step& step) {
  const microadam_tensor& tensor = *job.tensor;
  const int64_t element = job.dense->start + first, moment = job.dense->state_start + first;
  DensePiece piece;
  piece.param = at_element(tensor.param, tensor.param_dtype, element);
  piece.grad = at_element(tensor.grad, tensor.grad_dtype, element);
  piece.exp_avg = tensor.exp_avg + moment;
  piece.exp_avg_sq = tensor.exp_avg_sq + moment;
  piece.numel = static_cast<int>(std::min(job.units_per_piece, job.dense->numel - first));
  piece.counter = counter_of(tensor, job.dense->place, element);
  if (call.kernel->dense_step(piece, step)) return;
  if (!call.dense_skipped[&job - call.jobs.data()].exchange(true)) ++call.num_skipped;
}

// Rounding to nearest, subnormal numbers kept: an application may have set its threads otherwise.
class DefaultFloatMode {
 public:
  DefaultFloatMode() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatMode() { std::fesetenv(&saved_); }
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
  std::fenv_t saved_;
};

// What every thread does: take the next piece until there is none.
void work(void* argument) {
  Call& call = *static_cast<Call*>(argument);
  const DefaultFloatMode mode;
  Carver carver(call.scratch + call.scratch_bytes * static_cast<size_t>(call.next_thread++));
  const Scratch scratch = carve(call, carver);
  const Job* job = call.jobs.data();
  int64_t job_begin = 0;
  for (int64_t piece; (piece = call.next_piece++) < call.jobs.back().end;) {
    for (; piece >= job->end; ++job) job_begin = job->end;
    const microadam_tensor& tensor = *job->tensor;
    const Step step = {tensor.scalars,
                       call.settings->window_size,
                       call.settings->bucket_size,
                       tensor.param_dtype,
                       tensor.grad_dtype,
                       tensor.is_stochastic != 0,
                       static_cast<int>(call.settings->levels)};
    const int64_t first = (piece - job_begin) * job->units_per_piece;
    if (job->blocks != nullptr) {
      run_blocks(call, *job, first, step, scratch);
    } else {
      run_dense(call, *job, first, step);
    }
  }
}

bool runs_here(int isa) {
  switch (isa) {
    case MICROADAM_PORTABLE:
      return true;
#ifdef MICROADAM_X86
    case MICROADAM_AVX2:
      // F16C came before AVX2; GCC 10 cannot be asked for it.
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    case MICROADAM_AVX512:
      return runs_here(MICROADAM_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
#endif
    default:
      return false;
  }
}

const Kernel* kernel_of([[maybe_unused]] int isa) {
#ifdef MICROADAM_X86
  if (isa == MICROADAM_AVX512) return &kAvx512Kernel;
  if (isa == MICROADAM_AVX2) return &kAvx2Kernel;
#endif
  return &kPortableKernel;
}

int64_t run(Call& call, const microadam_tensor* tensors, int64_t num_tensors, int num_threads) {
  plan(call, tensors, num_tensors);
  const int64_t num_pieces = call.jobs.empty() ? 0 : call.jobs.back().end;
  if (num_pieces == 0) return 0;
  const int threads = static_cast<int>(std::min<int64_t>(std::max(num_threads, 1), num_pieces));
  Carver sizes(nullptr);
  carve(call, sizes);
  call.scratch_bytes = sizes.used();
  // Zeros, because `moments` begins with them.
  const size_t total = static_cast<size_t>(threads) * call.scratch_bytes + kAlignment;
  const std::unique_ptr<char, decltype(&std::free)> memory(static_cast<char*>(std::calloc(total, 1)), &std::free);
  if (memory == nullptr) return -1;
  call.scratch = memory.get() + kAlignment - (uintptr_t)memory.get() % kAlignment;
  run_on_threads(threads, work, &call);
  return call.num_skipped;
}

void count_steps(const microadam_tensor* tensors, int64_t num_tensors) {
  for (const microadam_tensor* tensor = tensors; tensor != tensors + num_tensors; ++tensor) {
    if (tensor->counter != nullptr) ++*tensor->counter;
  }
}

}  // namespace
}  // namespace microadam

extern "C" {

int microadam_cpu_abi_version(void) { return MICROADAM_CPU_ABI_VERSION; }

int microadam_cpu_has_isa(int isa) { return microadam::runs_here(isa); }

const char* microadam_cpu_threading(void) { return microadam::threading(); }

int64_t microadam_cpu_step(const microadam_settings* settings, const microadam_tensor* tensors, int64_t num_tensors,
                           int isa, int num_threads) {
  try {
    microadam::Call call;
    call.settings = settings;
    call.kernel = microadam::kernel_of(isa);
    const int64_t num_skipped = microadam::run(call, tensors, num_tensors, num_threads);
    if (num_skipped >= 0) microadam::count_steps(tensors, num_tensors);
    return num_skipped;
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

}  // extern "C"
