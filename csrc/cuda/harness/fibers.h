// Runs a function once for each thread of a thread block, as fibers that take turns where threads wait for each other.
//
// To be included once by a program: it defines what cuda.h declares.
#pragma once

#include <ucontext.h>

#include "cuda.h"

namespace microadam {

float to_float(Fp16 x) { return static_cast<float>(harness::bit_cast<_Float16>(x.bits)); }

}  // namespace microadam

namespace harness {

Dim3 thread, block;
char* shared_memory;

namespace {

constexpr int kMaxThreads = 512;
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

Context contexts[kMaxThreads], main_context;
bool has_ended[kMaxThreads], is_stuck;
int num_threads, num_running, direction;
Barrier block_barrier, beside_barrier, warp_barriers[kMaxThreads / 32];
unsigned given[kMaxThreads];  // to `exchange`
alignas(64) char stacks[kMaxThreads][kStackBytes];
void (*call)(const void* function);
const void* function;

int next_thread() {
  int next = thread.x;
  do {
    next = (next + direction + num_threads) % num_threads;
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
  call(function);
  const int self = thread.x;
  has_ended[self] = true;
  if (--num_running == 0) switch_context(&contexts[self], &main_context);
  const int next = next_thread();
  thread.x = next;
  switch_context(&contexts[self], &contexts[next]);
}

void run_all(bool reverse) {
  direction = reverse ? -1 : 1;
  block_barrier = beside_barrier = Barrier();
  for (Barrier& barrier : warp_barriers) barrier = Barrier();
  for (int i = 0; i < num_threads; ++i) {
    has_ended[i] = false;
    make_context(&contexts[i], stacks[i], run_thread);
  }
  num_running = num_threads;
  thread.x = reverse ? num_threads - 1 : 0;
  is_stuck = false;
  switch_context(&main_context, &contexts[thread.x]);
}

// Calls f(shared) as every thread of one thread block; `reverse`: the threads take turns from the last to the first.
// Returns false when threads wait for others that never come.
template <class Traits, class F>
bool run_block(bool reverse, const F& f) {
  alignas(64) static microadam::Shared<Traits> shared;
  shared_memory = reinterpret_cast<char*>(&shared);
  memset(shared_memory, 0xcd, sizeof shared);
  num_threads = Traits::kThreads;
  call = [](const void* function) { (*static_cast<const F*>(function))(shared); };
  function = &f;
  run_all(reverse);
  return !is_stuck;
}

}  // namespace

unsigned lane() { return thread.x % 32; }
void wait_for_block() { wait_at(block_barrier, num_threads); }
void wait_for(int count) { wait_at(beside_barrier, count); }
void wait_for_warp() { wait_at(warp_barriers[thread.x / 32], 32); }

const unsigned* from_lanes(unsigned value) {
  given[thread.x] = value;
  wait_for_warp();
  return given + thread.x / 32 * 32;
}
void done_with_lanes() { wait_for_warp(); }

}  // namespace harness
