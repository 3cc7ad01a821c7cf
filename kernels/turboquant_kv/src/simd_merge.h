// The simdgroups' softmaxes become one, as in decode_merge.h, from the matrices that each holds.
mass += tq_shuffle_xor(mass, 1);
mass += tq_shuffle_xor(mass, 8);
if (c == 0) {
  row_peak[int(warp) * ROWS + r] = peak;
  row_mass[int(warp) * ROWS + r] = mass;
}
TQ_BARRIER();
float top = TQ_NO_PEAK;
for (int i = 0; i < WARPS; i++) top = tq_max(top, row_peak[i * ROWS + r]);
const float weight = tq_exp2(peak - top);
for (int w = 0; w < WARPS; w++) {
  if (int(warp) == w && r < LIVE) {
    TQ_SHARED float* sums = work + r * DV + c * (DV / 4);
#pragma unroll
    for (int i = 0; i < DV / 8; i++) {
      const float2 x = tq_elements(o[i]) * weight;
      sums[2 * i] = x.x + (w > 0 ? sums[2 * i] : 0.0f);
      sums[2 * i + 1] = x.y + (w > 0 ? sums[2 * i + 1] : 0.0f);
    }
  }
  TQ_BARRIER();
}
