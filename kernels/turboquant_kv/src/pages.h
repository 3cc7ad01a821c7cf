// What the kernels over whole pages share: LANES neighbouring lanes of a warp hold a vector of D dims together, PER each.
//
// H = kron(A, S), A of order BASE and S Sylvester's (rotation.py). Of a power of two dims BASE is 1 and a lane holds
// units of eight dims, 8 * (LANES * k + part) + 0..7 for k < UNITS: a unit's codes are BITS bytes. Of others a lane holds
// a column, the dims LANES * i + part of all i < BASE: A then mixes what one lane holds, and S what all of them hold.
//
//   D = 64, BASE = 1, LANES = 8           D = 96, BASE = 12, LANES = 8
//   part   0    1    2  ...  7            part    0  1  2 ... 7
//   dims  0-7 8-15 16-23   56-63          dims    0  1  2     7
//                                                 8  9 10    15
//                                                 :  :  :     :
#pragma once
#include "codes.h"
#include "figures.h"
#include "turning.h"

TQ_CONSTANT int PAGE_THREADS = 128;
TQ_CONSTANT int VECTORS = PAGE_THREADS / LANES;  // of a block, at a time
TQ_CONSTANT int VECTOR_BYTES = D * BITS / 8;
TQ_CONSTANT int LEVELS = 1 << (BITS + TRELLIS);  // a trellis has twice as many as its bits could tell apart
TQ_CONSTANT int TURN_PITCH = D + LANES;  // of a vector in shared memory; LANES more: columns then meet in no bank

// A lane's share: of which head, which of the block's vectors, which part of that.
struct TqShare {
  int head, vector, part;
};
TQ_FN TqShare tq_share(TqPlace place) {
  return {int(place.block_y), int(place.tid) / LANES, int(place.lane) % LANES};
}

// Row of the (pages, heads, page tokens) rows of codes and scales in which token `token` of these pages lies.
TQ_FN int tq_page_row(int page_id, int head, int token) { return (page_id * HEADS + head) * PAGE + token % PAGE; }

// The Hadamard butterfly over a vector's lanes; each mixes the PER values that it holds beforehand.
TQ_FN void tq_spread(TQ_THREAD float* x, uint lane) {
#pragma unroll
  for (uint mask = 1; mask < uint(LANES); mask *= 2) {
    const float sign = lane & mask ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < PER; i++) x[i] = tq_shuffle_xor(x[i], mask) + sign * x[i];
  }
}

// A over a lane's column, or A transposed: the kernel's text says which of both tq_base is, signs of A's rows as bits.
template <int ORDER>
TQ_FN void tq_mix(TQ_THREAD float* x) {
  float from[ORDER];
#pragma unroll
  for (int i = 0; i < ORDER; i++) from[i] = x[i];
#pragma unroll
  for (int i = 0; i < ORDER; i++) {
    x[i] = 0.0f;
#pragma unroll
    for (int k = 0; k < ORDER; k++) x[i] += (tq_base(i) >> k) & 1 ? -from[k] : from[k];
  }
}

// H, or its transpose, of a vector.
TQ_FN void tq_rotate(TQ_THREAD float* x, uint lane) {
  if (BASE == 1) tq_own_hadamard<PER>(x);
  else tq_mix<PER>(x);
  tq_spread(x, lane);
}

TQ_FN float tq_vector_sum(float x) {
#pragma unroll
  for (uint mask = 1; mask < uint(LANES); mask *= 2) x += tq_shuffle_xor(x, mask);
  return x;
}

// Eight dims of an exact row from d on; is_wide: they lie side by side.
template <typename T>
TQ_FN void tq_read_row(const TQ_DEVICE T* row, int stride, bool is_wide, int d, TQ_THREAD float* out) {
  if (is_wide) {
    tq_load8(row + d, out);
  } else {
    for (int i = 0; i < 8; i++) out[i] = float(row[(d + i) * stride]);
  }
}
