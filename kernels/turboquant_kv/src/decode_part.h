// A block's part goes out: first all parts' totals (LIVE, DV), then all parts' peak and mass per row.
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
