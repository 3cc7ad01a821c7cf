// The warps' softmaxes become one, in shared memory; decode_part.h writes it out.
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
