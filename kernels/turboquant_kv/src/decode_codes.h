// Compressed tokens, portable: tiles of 32 tokens go to the warps in turn. Scores: a token a lane, so nothing is summed
// across lanes. Values: a pair of dims a lane, weights by shuffle.
const int K_BYTES = D * KBITS / 8;
const int V_BYTES = DV * VBITS / 8;
for (int tile = first_tile + int(warp); tile < last_tile; tile += WARPS) {
  const int token = tile * 32 + int(lane);
  uint row_id = 0;  // of the (pages, heads, page tokens) rows of the storage
  float score[LIVE];
  for (int r = 0; r < LIVE; r++) score[r] = 0.0f;
  if (token < num_tokens) {
    row_id = uint((page_table[sequence * plan[1] + token / PAGE] * HEADS + head) * PAGE + token % PAGE);
    const TQ_DEVICE uchar* vector = k_codes + ulong(row_id) * K_BYTES;
    for (int u = 0; u < D / 8; u++) {
      float c[8];
      tq_unit<KBITS>(vector + u * KBITS, k_table, c);
      for (int r = 0; r < LIVE; r++) {
        for (int i = 0; i < 8; i++) score[r] += shared_q[r * D + u * 8 + i] * c[i];
      }
    }
  }
  const float k_scale = token < num_tokens ? float(k_scales[row_id]) : 0.0f;
  const float v_scale = token < num_tokens ? float(v_scales[row_id]) : 0.0f;
  for (int r = 0; r < LIVE; r++) {
    score[r] = token < limits[r] && token >= lows[r] ? score[r] * k_scale + row_mean[r] : TQ_MASKED;
    const float new_peak = tq_max(peak[r], tq_lane_max(score[r]));
    const float fade = tq_exp2(peak[r] - new_peak);
    peak[r] = new_peak;
    const float p = tq_exp2(score[r] - new_peak);
    mass[r] = mass[r] * fade + p;
    score[r] = p * v_scale;
    for (int i = 0; i < PAIRS * 2; i++) total[r][i] *= fade;
  }
  const int count = num_tokens - tile * 32 < 32 ? num_tokens - tile * 32 : 32;
#pragma unroll 4
  for (int t = 0; t < count; t++) {
    const TQ_DEVICE uchar* vector = v_codes + ulong(tq_shuffle(row_id, uint(t))) * V_BYTES;
    float weight[LIVE];
    for (int r = 0; r < LIVE; r++) weight[r] = tq_shuffle(score[r], uint(t));
    for (int i = 0; i < PAIRS; i++) {
      const uint d = 2 * lane + 64 * i;
      if (d < DV) {
        float c[2];
        tq_pair<VBITS>(vector, d, v_table, c);
        for (int r = 0; r < LIVE; r++) {
          total[r][2 * i] += weight[r] * c[0];
          total[r][2 * i + 1] += weight[r] * c[1];
        }
      }
    }
  }
}
