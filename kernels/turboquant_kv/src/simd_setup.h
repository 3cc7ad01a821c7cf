// Lane (r, c) holds elements (r, 2c) and (r, 2c + 1) of an 8x8 matrix. The queries become matrices Q^T of 8 dims x 8 rows,
// as each lane takes them, where nothing else lies until the merge: row k of matrix i is dim k / 2 * (D / 4) + 2i + k % 2,
// what lane column k / 2 holds of keys.
const int r = int((lane >> 2 & 4) | (lane >> 1 & 3)), c = int((lane >> 2 & 2) | (lane & 1));
TQ_SHARED Pair* q_pairs = reinterpret_cast<TQ_SHARED Pair*>(work);
for (int i = int(warp); i < D / 8; i += WARPS) {
  const int d = r / 2 * (D / 4) + 2 * i + r % 2;
  q_pairs[32 * i + int(lane)] = tq_two(Piece(shared_q[2 * c * D + d]), Piece(shared_q[(2 * c + 1) * D + d]));
}
TQ_BARRIER();

// The lane's row of scores and output, and its running softmax; masses are sums over the row's four lanes.
const int first_row = r, NUM_ROWS = 1;
#include "decode_limits.h"
const int low = lows[0], limit = limits[0];
const float mean = row_mean[r];
float peak = TQ_NO_PEAK, mass = 0.0f;
simdgroup_matrix<float, 8, 8> o[DV / 8];
#pragma unroll
for (int i = 0; i < DV / 8; i++) tq_elements(o[i]) = float2(0.0f);
