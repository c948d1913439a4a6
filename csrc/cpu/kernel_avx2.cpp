#include "simd_avx2.h"
// The header above gives the kernel its vectors.
#include "block_step.h"

namespace microadam {
const Kernel kAvx2Kernel = {block_step, dense_step};
}
