// One block per query row: all parts by log-sum-exp, attention sinks, back from the values' rotated basis, mean_v.
// Threads: PARTS runs of WIDTH, WIDTH being DV rounded up to whole warps; splits are summed PARTS at a time.
const int THREADS = PARTS * WIDTH;
const int GROUP_ROWS = G * QROWS;
const int CHUNKS = (GROUP_ROWS + ROWS - 1) / ROWS;
const int sequence = int(block_z);
const int q_head = int(block_y);
const int query = int(block_x);
const int row = (q_head % G) * QROWS + query;
const int num_tiles = (meta[8 + 8 * sequence + 2] * PAGE + 31) / 32;
const int num_parts = 1 + (num_tiles + meta[0] - 1) / meta[0];
const ulong first_part = ((ulong(sequence) * CHUNKS + row / ROWS) * HEADS + q_head / G) * meta[2];

TQ_SHARED_ARRAY(float, weights, MAX_PARTS);
TQ_SHARED_ARRAY(float, masses, 2);
TQ_SHARED_ARRAY(float, work, PARTS * DV);
if (warp == 0) {
  float top = USE_SINKS ? float(sinks[q_head]) * 1.44269504f : TQ_NO_PEAK;
  for (int i = int(lane); i < num_parts; i += 32) top = tq_max(top, stats[((first_part + i) * ROWS + row % ROWS) * 2]);
  top = tq_lane_max(top);
  float compressed = 0.0f, exact = 0.0f;
  for (int i = int(lane); i < num_parts; i += 32) {
    const ulong at = ((first_part + i) * ROWS + row % ROWS) * 2;
    const float weight = tq_exp2(stats[at] - top);
    weights[i] = weight;
    if (i > 0) compressed += weight * stats[at + 1];
    else exact = weight * stats[at + 1];
  }
  compressed = tq_lane_sum(compressed);
  exact = tq_lane_sum(exact);
  if (lane == 0) {
    masses[0] = compressed;
    masses[1] = compressed + exact + (USE_SINKS ? tq_exp2(float(sinks[q_head]) * 1.44269504f - top) : 0.0f);
  }
}
TQ_BARRIER();
const int d = int(tid) % WIDTH;
const int run = int(tid) / WIDTH;
float exact_total = 0.0f;
if (d < DV) {
  float sum = 0.0f;
#pragma unroll 8
  for (int i = 1 + run; i < num_parts; i += PARTS) {
    sum += weights[i] * totals[((first_part + i) * ROWS + row % ROWS) * DV + d];
  }
  if (run == 0) exact_total = weights[0] * totals[(first_part * ROWS + row % ROWS) * DV + d];
  work[run * DV + d] = sum;
}
TQ_BARRIER();
if (run == 0 && d < DV) {
  float sum = work[d];
  for (int i = 1; i < PARTS; i++) sum += work[i * DV + d];
  work[d] = sum;
}
float restored = 0.0f;
if ((DV & (DV - 1)) == 0) {
  tq_hadamard(work, 1, DV, tid, THREADS);
  if (d < DV) restored = work[d] * v_rotation[d];
} else {
  TQ_BARRIER();
  if (d < DV && run == 0) {
    for (int i = 0; i < DV; i++) restored += work[i] * v_rotation[i * DV + d];
  }
}
if (run == 0 && d < DV) {
  const float all = masses[1];
  const float sum = restored + masses[0] * v_mean[(q_head / G) * DV + d] + exact_total;
  const int num_queries = meta[8 + 8 * sequence + 1];
  out[((ulong(sequence) * HEADS * G + q_head) * QROWS + query) * DV + d] =
      Out(all > 0.0f && query < num_queries ? sum / all : 0.0f);
}
