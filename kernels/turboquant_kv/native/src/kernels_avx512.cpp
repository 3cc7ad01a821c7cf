// The avx512 level; see level.h. Compiled with its own flags (CMakeLists.txt).
#include <array>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "jobs.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && !defined(TURBOQUANT_LEFT_OUT)
namespace tq::avx512_level {
#include "isa_avx512.h"

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
} // namespace tq::avx512_level

const tq::KernelTable* tq::avx512_kernels() { return &avx512_level::kTable; }
#else
const tq::KernelTable* tq::avx512_kernels() { return nullptr; }
#endif
