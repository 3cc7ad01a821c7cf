// The avx2 level; see level.h. Compiled with its own flags (CMakeLists.txt).
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "jobs.h"

#if defined(__AVX2__) && !defined(TURBOQUANT_LEFT_OUT)
namespace tq::avx2_level {
#include "isa_avx2.h"

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
} // namespace tq::avx2_level

const tq::KernelTable* tq::avx2_kernels() { return &avx2_level::kTable; }
#else
const tq::KernelTable* tq::avx2_kernels() { return nullptr; }
#endif
