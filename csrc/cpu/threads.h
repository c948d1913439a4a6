// Threads for one call, without bringing an OpenMP runtime into the process.
#pragma once

namespace microadam {

// Calls work(argument) on up to num_threads threads, this one among them, and returns when all have finished.
void run_on_threads(int num_threads, void (*work)(void*), void* argument);

// Where the threads come from; see microadam_cpu_threading.
const char* threading();

}  // namespace microadam
