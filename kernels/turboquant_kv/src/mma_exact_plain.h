// Exact rows of 32 bits, for which tensor cores are too coarse: a warp takes every WARPS-th row for one query row after
// the other, each lane DV / 32 dims. Slow, and rare: models are served in 16 bits. Ends in the layout of mma_codes.h.
const int sink_offset = plan[about + 3], num_sink = plan[about + 4];
const int window_offset = plan[about + 5], window_start = plan[about + 6], num_window = plan[about + 7];
const int num_exact = num_sink + num_window;
float* weights = reinterpret_cast<float*>(arena);  // (8 rows, 16 tokens) of the warp's tile
weights += int(warp) * 128;
num_busy = max(1, min(WARPS, (num_exact + 15) / 16));
for (int start = int(warp) * 16; start < num_exact; start += 16 * WARPS) {
  for (int row = 0; row < 8; row++) {
    const int index = chunk * 8 + row, query = q_start + index % QROWS;
    const bool lives = index < GROUP_ROWS && index % QROWS < num_queries;
    for (int t = 0; t < 16; t++) {
      const int token = min(start + t, num_exact - 1);
      const bool in_sink = token < num_sink;
      const int position = in_sink ? token : window_start + token - num_sink;
      const Exact* key = in_sink
          ? sink_k + (head * sink_k_strides[0] + (sink_offset + token) * sink_k_strides[1])
          : window_k + (head * window_k_strides[0] + (window_offset + token - num_sink) * window_k_strides[1]);
      float dot = 0.0f;
      if (lives) {
        for (int d = int(lane); d < D; d += 32) {
          dot += float(key[d]) * float(queries[sequence * queries_strides[0] + (head * G + index / QROWS) * queries_strides[1] +
                                               (index % QROWS) * queries_strides[2] + d * queries_strides[3]]);
        }
      }
      dot = tq_lane_sum(dot);
      const bool seen = lives && start + t < num_exact && position <= query && position > query - reach &&
          (in_sink || (query >= SINK && (position - SINK) / PAGE == (query - SINK) / PAGE));
      if (lane == 0) weights[row * 16 + t] = seen ? dot * scale : TQ_MASKED;
    }
  }
  __syncwarp();
  float n_0 = m_0, n_1 = m_1;
  for (int t = 0; t < 16; t++) {
    n_0 = fmaxf(n_0, weights[2 * c * 16 + t]);
    n_1 = fmaxf(n_1, weights[(2 * c + 1) * 16 + t]);
  }
  const float f_0 = tq_exp2(m_0 - n_0), f_1 = tq_exp2(m_1 - n_1);
  m_0 = n_0;
  m_1 = n_1;
  l_0 *= f_0;
  l_1 *= f_1;
#pragma unroll
  for (int j = 0; j < DV / 16; j++) {
    o[j][0] *= f_0;
    o[j][1] *= f_1;
    o[j][2] *= f_0;
    o[j][3] *= f_1;
  }
  for (int t = 0; t < 16; t++) {
    const float p_0 = tq_exp2(weights[2 * c * 16 + t] - m_0), p_1 = tq_exp2(weights[(2 * c + 1) * 16 + t] - m_1);
    if (r == 0) {  // masses are summed over the lanes of a column at the end
      l_0 += p_0;
      l_1 += p_1;
    }
    const int token = min(start + t, num_exact - 1);
    const Exact* value = token < num_sink
        ? sink_v + (head * sink_v_strides[0] + (sink_offset + token) * sink_v_strides[1])
        : window_v + (head * window_v_strides[0] + (window_offset + token - num_sink) * window_v_strides[1]);
#pragma unroll
    for (int j = 0; j < DV / 16; j++) {
      const float even = float(value[r * (DV / 8) + 2 * j]), odd = float(value[r * (DV / 8) + 2 * j + 1]);
      o[j][0] += p_0 * even;
      o[j][1] += p_1 * even;
      o[j][2] += p_0 * odd;
      o[j][3] += p_1 * odd;
    }
  }
  __syncwarp();
}
