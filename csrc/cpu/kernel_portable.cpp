#include "simd_portable.h"
// The header above gives the kernel its vectors.
#include "block_step.h"

namespace microadam {
const Kernel kPortableKernel = {block_step, dense_step};
}
