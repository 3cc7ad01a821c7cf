// The portable level; see level.h. Compiled with its own flags (CMakeLists.txt).
#include <cstring>

#include "jobs.h"

#if !defined(TURBOQUANT_LEFT_OUT)
namespace tq::portable_level {
#include "isa_portable.h"

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
} // namespace tq::portable_level

const tq::KernelTable* tq::portable_kernels() { return &portable_level::kTable; }
#else
const tq::KernelTable* tq::portable_kernels() { return nullptr; }
#endif
