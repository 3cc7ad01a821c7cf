// The tensor-core decode kernel, CUDA's variant of the portable one: same plan, same parts, same merge. Its text is put
// together here; constants and TQ_ switches come from launch.py.
#include "opening_cuda.h"
#include "mma_barriers.h"
#include "plan.h"
#include "mma_shared.h"
if (block_x == 0) {
#if TQ_NUM_SETS > 1
#include "mma_sets.h"
#endif
#if TQ_EXACT_MMA
#include "mma_exact.h"
#else
#include "mma_exact_plain.h"
#endif
} else {
#include "mma_codes.h"
}
#include "mma_merge.h"
#if TQ_FUSED
#include "mma_finish.h"
#endif
