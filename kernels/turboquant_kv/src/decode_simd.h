// The decode kernel on Metal's 8x8 matrices: the portable kernel's plan, queries, exact rows and parts; only compressed
// tokens are another walk. Exact rows stay portable: they are at most a sink and a page, in a block of their own.
#include "opening_metal.h"
#include "plan.h"
#include "simd_tables.h"
#include "decode_shared.h"
#include "decode_queries.h"
if (block_x == 0) {
#include "decode_setup.h"
#include "decode_exact.h"
#include "decode_merge.h"
} else {
#include "simd_setup.h"
#include "simd_codes.h"
#include "simd_merge.h"
}
#include "decode_part.h"
