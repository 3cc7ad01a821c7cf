// Exact rows: sink [0, sink rows) and window [window position, + window rows), a tile of 32 a warp, a token a lane.
const int sink_offset = plan[about + 3], num_sink = plan[about + 4];
const int window_offset = plan[about + 5], window_start = plan[about + 6], num_window = plan[about + 7];
const int num_exact = num_sink + num_window;
for (int start = int(warp) * 32; start < num_exact; start += THREADS) {
  const int token = start + int(lane);
  const bool in_sink = token < num_sink;
  const int position = in_sink ? token : window_start + token - num_sink;
  float score[LIVE];
  for (int r = 0; r < LIVE; r++) score[r] = 0.0f;
  if (token < num_exact) {
    const TQ_DEVICE Exact* key = in_sink
        ? sink_k + (head * sink_k_strides[0] + (sink_offset + token) * sink_k_strides[1])
        : window_k + (head * window_k_strides[0] + (window_offset + token - num_sink) * window_k_strides[1]);
#pragma unroll 4
    for (int d = 0; d < D; d += 8) {
      float x[8];
      tq_load8(key + d, x);
      for (int r = 0; r < LIVE; r++) {
        for (int i = 0; i < 8; i++) score[r] += shared_q[r * D + d + i] * x[i];
      }
    }
  }
  for (int r = 0; r < LIVE; r++) {
    const int row = chunk * ROWS + r;
    const int query = q_start + row % QROWS;
    // The window's tokens are exact for queries of their own page only; others see them through their codes.
    const bool seen = token < num_exact && row < GROUP_ROWS && row % QROWS < num_queries && position <= query &&
        position > query - reach &&
        (in_sink || (query >= SINK && (position - SINK) / PAGE == (query - SINK) / PAGE));
    if (!seen) score[r] = TQ_MASKED;
    const float new_peak = tq_max(peak[r], tq_lane_max(score[r]));
    const float fade = tq_exp2(peak[r] - new_peak);
    peak[r] = new_peak;
    score[r] = tq_exp2(score[r] - new_peak);
    mass[r] = mass[r] * fade + score[r];
    for (int i = 0; i < PAIRS * 2; i++) total[r][i] *= fade;
  }
  const int count = num_exact - start < 32 ? num_exact - start : 32;
#pragma unroll 8
  for (int t = 0; t < count; t++) {
    float weight[LIVE];
    for (int r = 0; r < LIVE; r++) weight[r] = tq_shuffle(score[r], uint(t));
    const TQ_DEVICE Exact* value = start + t < num_sink
        ? sink_v + (head * sink_v_strides[0] + (sink_offset + start + t) * sink_v_strides[1])
        : window_v + (head * window_v_strides[0] + (window_offset + start + t - num_sink) * window_v_strides[1]);
    for (int i = 0; i < PAIRS * 2; i++) {
      const int d = 2 * int(lane) + 64 * (i / 2) + i % 2;
      if (d < DV) {
        const float x = float(value[d]);
        for (int r = 0; r < LIVE; r++) total[r][i] += weight[r] * x;
      }
    }
  }
}
