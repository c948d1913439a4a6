// The kernel for one element type of weights and gradients and one shape of thread block, run by fibers.
//
//   g++ -std=c++17 -O2 -ffp-contract=off -fPIC -shared -DMICROADAM_HARNESS -DMICROADAM_PARAM=Fp32 ... harness.cpp
#include "../block_step.cuh"
#include "../scalars.cuh"

#include <ucontext.h>

#include <vector>

namespace microadam {

float to_float(Fp16 x) { return static_cast<float>(harness::bit_cast<_Float16>(x.bits)); }

}  // namespace microadam

namespace harness {

Dim3 thread, block;

namespace {

constexpr int kThreads = microadam::kThreads, kWarps = kThreads / 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

// What a fiber needs to be resumed: registers that a call preserves lie on its stack.
#ifdef __x86_64__
using Context = void*;

extern "C" void harness_switch(void** from, void* to);
asm(R"(
.text
.globl harness_switch
harness_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

void switch_context(Context* from, Context* to) { harness_switch(from, *to); }

void make_context(Context* context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t{63}) - 1;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  *context = top;
}
#else
using Context = ucontext_t;

void switch_context(Context* from, Context* to) { swapcontext(from, to); }

void make_context(Context* context, char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackBytes;
  makecontext(context, entry, 0);
}
#endif

Context contexts[kThreads], main_context;
bool has_ended[kThreads], is_stuck;
int num_running, direction;
Barrier block_barrier, first_barrier, warp_barriers[kWarps];
unsigned slots[kThreads];
std::vector<char> stacks;
const microadam::Launch* current_launch;
alignas(64) char shared_memory[sizeof(microadam::Shared)];

int next_thread() {
  int next = thread.x;
  do {
    next = (next + direction + kThreads) % kThreads;
  } while (has_ended[next]);
  return next;
}

void switch_to(int next) {
  const int self = thread.x;
  if (next == self) return;
  thread.x = next;
  switch_context(&contexts[self], &contexts[next]);
  thread.x = self;
}

void wait_at(Barrier& barrier, int count) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  for (int turns = 0; barrier.generation == generation; ++turns) {
    if (turns > 100000) {  // a deadlock on a GPU
      is_stuck = true;
      switch_context(&contexts[thread.x], &main_context);
    }
    switch_to(next_thread());
  }
}

void run_thread() {
  microadam::step(*current_launch, block.x, *reinterpret_cast<microadam::Shared*>(shared_memory));
  const int self = thread.x;
  has_ended[self] = true;
  if (--num_running == 0) switch_context(&contexts[self], &main_context);
  const int next = next_thread();
  thread.x = next;
  switch_context(&contexts[self], &contexts[next]);
}

}  // namespace

unsigned lane() { return thread.x % 32; }
void wait_for_block() { wait_at(block_barrier, kThreads); }
void wait_for_warp() { wait_at(warp_barriers[thread.x / 32], 32); }
void wait_for_first(int count) { wait_at(first_barrier, count); }

unsigned exchange(unsigned value, unsigned source) {
  slots[thread.x] = value;
  wait_for_warp();
  const unsigned result = slots[thread.x / 32 * 32 + source];
  wait_for_warp();
  return result;
}

}  // namespace harness

// Runs the thread blocks of a launch one after the other; `reverse`: the threads take turns from the last to the first.
// Returns false when threads wait for others that never come.
extern "C" int harness_step(const microadam::Launch* launch, unsigned num_blocks, int window_size, int bucket_size,
                            int packed_window, int reverse) {
  using namespace harness;
  microadam::kWindowSize = window_size;
  microadam::kBucketSize = bucket_size;
  microadam::kPackedWindow = packed_window;
  current_launch = launch;
  direction = reverse ? -1 : 1;
  stacks.resize(kStackBytes * kThreads);
  for (block.x = 0; block.x < num_blocks; ++block.x) {
    memset(shared_memory, 0xcd, sizeof shared_memory);
    block_barrier = first_barrier = Barrier();
    for (Barrier& barrier : warp_barriers) barrier = Barrier();
    for (int i = 0; i < kThreads; ++i) {
      has_ended[i] = false;
      make_context(&contexts[i], stacks.data() + kStackBytes * i, run_thread);
    }
    num_running = kThreads;
    thread.x = reverse ? kThreads - 1 : 0;
    is_stuck = false;
    switch_context(&main_context, &contexts[thread.x]);
    if (is_stuck) return 0;
  }
  return 1;
}

extern "C" void harness_scalars(const microadam::Launch* launch) {
  for (int i = 0; i < launch->num_tensors; ++i) microadam::compute_scalars(*launch, i);
}

extern "C" int harness_launch_bytes() { return sizeof(microadam::Launch); }
