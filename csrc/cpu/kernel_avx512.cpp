#include "simd_avx512.h"
// The header above gives the kernel its vectors.
#include "block_step.h"

namespace microadam {
const Kernel kAvx512Kernel = {block_step, dense_step};
}
