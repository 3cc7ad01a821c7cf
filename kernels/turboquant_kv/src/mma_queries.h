// The block's queries, rotated, as halves in shared memory, and q . mean_k of each row. Rows that do not exist are zero.
if ((D & (D - 1)) == 0) {
  // A warp a row: a lane holds D / 32 neighbours, the Hadamard butterfly runs in registers and over lanes.
  const int PER = D / 32;
  for (int row = int(warp); row < 8; row += WARPS) {
    float x[PER], dot = 0.0f;
    const int index = chunk * 8 + row, query = index % QROWS;
    // Read before the plan is known; what does not live is dropped afterwards.
    const int safe = index < GROUP_ROWS ? index : 0;
    const In* p = queries + (sequence * queries_strides[0] + (head * G + safe / QROWS) * queries_strides[1] +
                             safe % QROWS * queries_strides[2]);
#pragma unroll
    for (int i = 0; i < PER; i++) x[i] = float(p[(lane * PER + i) * queries_strides[3]]);
    const bool lives = index < GROUP_ROWS && query < num_queries;
#pragma unroll
    for (int i = 0; i < PER; i++) x[i] = lives ? x[i] * scale : 0.0f;
#pragma unroll
    for (int i = 0; i < PER; i++) {
      dot += x[i] * k_constants[K_ROTATION + head * D + lane * PER + i];
      x[i] *= k_constants[lane * PER + i];
    }
    dot = tq_lane_sum(dot);
    tq_lane_hadamard<PER>(x, lane);
#pragma unroll
    for (int i = 0; i < PER; i += 2) {
      *reinterpret_cast<uint*>(shared_q + row * Q_PITCH + lane * PER + i) = tq_half_pair(x[i], x[i + 1]);
    }
    if (lane == 0) row_mean[row] = dot;
  }
} else {
  float* plain = reinterpret_cast<float*>(shared_q + 8 * Q_PITCH);  // where the rings begin later
  for (int i = int(tid); i < 8 * D; i += THREADS) {
    const int index = chunk * 8 + i / D, query = index % QROWS;
    float x = 0.0f;
    if (index < GROUP_ROWS && query < num_queries) {
      x = float(queries[sequence * queries_strides[0] + (head * G + index / QROWS) * queries_strides[1] +
                        query * queries_strides[2] + (i % D) * queries_strides[3]]) * scale;
    }
    plain[i] = x;
  }
  __syncthreads();
  for (int row = int(warp); row < 8; row += WARPS) {
    float dot = 0.0f;
    for (int d = int(lane); d < D; d += 32) dot += plain[row * D + d] * k_constants[K_ROTATION + head * D + d];
    dot = tq_lane_sum(dot);
    if (lane == 0) row_mean[row] = dot;
  }
  float* partial = plain + 8 * D;
  tq_rotate_densely<8, D, WARPS>(plain, k_constants, partial, warp, lane);  // stored transposed: threads read neighbours
  __syncthreads();
  for (int i = int(tid); i < 8 * D; i += THREADS) {
    shared_q[i / D * Q_PITCH + i % D] = __float2half_rn(tq_partial_sum<8, D, WARPS>(partial, i));
  }
  __syncthreads();
}
