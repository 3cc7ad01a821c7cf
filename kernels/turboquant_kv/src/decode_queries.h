// Queries of a block in shared memory: as they are for exact rows, in the keys' rotated basis for compressed tokens.
const int THREADS = 128;
const int WARPS = THREADS / 32;

// Phase 1: queries as base-2 logits. Rows beyond the group, or beyond a sequence's queries, are zero and see nothing.
for (int i = int(tid); i < ROWS * D; i += THREADS) {
  const int row = chunk * ROWS + i / D;
  const int query = row % QROWS;
  float x = 0.0f;
  if (row < GROUP_ROWS && query < num_queries) {
    x = float(queries[sequence * queries_strides[0] + (head * G + row / QROWS) * queries_strides[1] +
                      query * queries_strides[2] + (i % D) * queries_strides[3]]) * scale;
  }
  shared_q[i] = x;
}
TQ_BARRIER();

// Phase 2, compressed tokens only: q . mean_k, then the queries into the rotated basis.
if (block_x > 0) {
  for (int r = int(warp); r < ROWS; r += WARPS) {
    float dot = 0.0f;
    for (int d = int(lane); d < D; d += 32) dot += shared_q[r * D + d] * k_constants[K_ROTATION + head * D + d];
    dot = tq_lane_sum(dot);
    if (lane == 0) row_mean[r] = dot;
  }
  TQ_BARRIER();
  if ((D & (D - 1)) == 0) {
    // sign / sqrt(D), the rotation's first row: a Sylvester matrix begins with ones.
    for (int i = int(tid); i < LIVE * D; i += THREADS) shared_q[i] *= k_constants[i % D];
    tq_hadamard(shared_q, LIVE, D, tid, THREADS);  // rows that do not exist are zero and stay so
  } else {
    for (int i = int(tid); i < D; i += THREADS) {
      float sum[ROWS];
      for (int r = 0; r < ROWS; r++) sum[r] = 0.0f;
      for (int d = 0; d < D; d++) {
        const float c = k_constants[d * D + i];  // stored transposed, so that threads read neighbours
        for (int r = 0; r < ROWS; r++) sum[r] += shared_q[r * D + d] * c;
      }
      for (int r = 0; r < ROWS; r++) work[r * D + i] = sum[r];
    }
    TQ_BARRIER();
    for (int i = int(tid); i < ROWS * D; i += THREADS) shared_q[i] = work[i];
    TQ_BARRIER();
  }
}
