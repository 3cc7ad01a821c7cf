// The neon level; see level.h. Compiled with its own flags (CMakeLists.txt).
#include <cstring>

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#include "jobs.h"

#if defined(__ARM_FEATURE_DOTPROD) && !defined(TURBOQUANT_LEFT_OUT)
namespace tq::neon_level {
#include "isa_neon.h"

#include "codes.h"
#include "rows.h"
#include "scores.h"
#include "turning.h"
#include "decode.h"
#include "gemm.h"
#include "prefill.h"
#include "encode.h"
#include "linear.h"
#include "blocks.h"
#include "draw.h"
#include "level.h"
} // namespace tq::neon_level

const tq::KernelTable* tq::neon_kernels() { return &neon_level::kTable; }
#else
const tq::KernelTable* tq::neon_kernels() { return nullptr; }
#endif
