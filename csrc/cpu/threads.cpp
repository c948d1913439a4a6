#include "threads.h"

#include <exception>
#include <thread>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
#endif

namespace microadam {
namespace {

// What a compiler calls for "#pragma omp parallel": the same in GNU libgomp and LLVM libomp.
using GompParallel = void (*)(void (*work)(void*), void* argument, unsigned num_threads, unsigned flags);

// torch ships an OpenMP runtime under a name that differs from release to release, and makes its symbols global. To
// link one ourselves could load a second runtime with a second set of threads; taking the one that is there cannot.
// Without one, threads are started for each call: 65 microseconds for the second thread where OpenMP's, which wait for
// work, take 25.
GompParallel find_openmp() {
#ifdef __linux__
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

GompParallel openmp() {
  static const GompParallel found = find_openmp();
  return found;
}

void run_on_new_threads(int num_threads, void (*work)(void*), void* argument) {
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(num_threads));
  try {
    for (int i = 1; i < num_threads; ++i) threads.emplace_back(work, argument);
  } catch (const std::exception&) {
    // No more threads to be had: the ones that run share the work.
  }
  work(argument);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

void run_on_threads(int num_threads, void (*work)(void*), void* argument) {
  if (num_threads <= 1) {
    work(argument);
  } else if (openmp() != nullptr) {
    openmp()(work, argument, static_cast<unsigned>(num_threads), 0);
  } else {
    run_on_new_threads(num_threads, work, argument);
  }
}

const char* threading() { return openmp() != nullptr ? "openmp" : "std::thread"; }

}  // namespace microadam
