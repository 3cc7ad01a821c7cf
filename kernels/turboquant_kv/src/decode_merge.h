// The warps' softmaxes become one, and the block's part goes out: first all parts' totals (LIVE, DV), then all parts'
// peak and mass per row.
for (int r = 0; r < LIVE; r++) {
  const float sum = tq_lane_sum(mass[r]);
  if (lane == 0) {
    row_peak[int(warp) * ROWS + r] = peak[r];
    row_mass[int(warp) * ROWS + r] = sum;
  }
}
TQ_BARRIER();
for (int w = 0; w < WARPS; w++) {
  if (int(warp) == w) {
    for (int r = 0; r < LIVE; r++) {
      float top = TQ_NO_PEAK;
      for (int i = 0; i < WARPS; i++) top = tq_max(top, row_peak[i * ROWS + r]);
      const float weight = tq_exp2(peak[r] - top);
      for (int i = 0; i < PAIRS * 2; i++) {
        const int d = 2 * int(lane) + 64 * (i / 2) + i % 2;
        if (d < DV) work[r * DV + d] = total[r][i] * weight + (w > 0 ? work[r * DV + d] : 0.0f);
      }
    }
  }
  TQ_BARRIER();
}
const ulong part = (ulong(block_z) * HEADS + block_y) * num_blocks_x + block_x;
for (int i = int(tid); i < LIVE * DV; i += THREADS) parts[part * (LIVE * DV) + i] = work[i];
if (int(tid) < LIVE) {
  float top = TQ_NO_PEAK, sum = 0.0f;
  for (int i = 0; i < WARPS; i++) top = tq_max(top, row_peak[i * ROWS + tid]);
  for (int i = 0; i < WARPS; i++) sum += row_mass[i * ROWS + tid] * tq_exp2(row_peak[i * ROWS + tid] - top);
  const ulong at = ulong(plan[3]) * (LIVE * DV) + (part * LIVE + tid) * 2;
  parts[at] = top;
  parts[at + 1] = sum;
}
