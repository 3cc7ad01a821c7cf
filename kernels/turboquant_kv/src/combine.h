// As combine_lanes.h, for any number of dims: all parts by log-sum-exp, attention sinks, back from the values' rotated
// basis, mean_v.
// Threads: PARTS runs of WIDTH, WIDTH being DV rounded up to whole warps; splits are summed PARTS at a time.
const int GROUP_ROWS = G * QROWS;
const int CHUNKS = (GROUP_ROWS + ROWS - 1) / ROWS;
const int sequence = int(block_z);
const int q_head = int(block_y);
const int query = int(block_x);
const int row = (q_head % G) * QROWS + query;
const int about = 8 + 8 * sequence;
const int num_unseen = plan[about] - SINK + 1 - plan[5];
const int num_tiles = (plan[about + 2] * PAGE + 31) / 32 - (num_unseen > 0 ? num_unseen / 32 : 0);
const int num_parts = 1 + (num_tiles > 0 ? (num_tiles + plan[0] - 1) / plan[0] : 0);
const ulong first_row = ((ulong(sequence) * CHUNKS + row / ROWS) * HEADS + q_head / G) * plan[2] * LIVE + row % ROWS;
const TQ_DEVICE float* stats = parts + ulong(plan[3]) * (LIVE * DV) + first_row * 2;
const TQ_DEVICE float* totals = parts + first_row * DV;

TQ_SHARED_ARRAY(float, weights, MAX_PARTS);
TQ_SHARED_ARRAY(float, masses, 2);
TQ_SHARED_ARRAY(float, work, PARTS * DV);
if (warp == 0) {
  float top = USE_SINKS ? float(sinks[q_head]) * 1.44269504f : TQ_NO_PEAK;
  for (int i = int(lane); i < num_parts; i += 32) top = tq_max(top, stats[i * 2 * LIVE]);
  top = tq_lane_max(top);
  float compressed = 0.0f, exact = 0.0f;
  for (int i = int(lane); i < num_parts; i += 32) {
    const float weight = tq_exp2(stats[i * 2 * LIVE] - top);
    weights[i] = weight;
    if (i > 0) compressed += weight * stats[i * 2 * LIVE + 1];
    else exact = weight * stats[i * 2 * LIVE + 1];
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
    sum += weights[i] * totals[ulong(i) * (LIVE * DV) + d];
  }
  if (run == 0) exact_total = weights[0] * totals[d];
  work[run * DV + d] = sum;
}
TQ_BARRIER();
if (run == 0 && d < DV) {
  float sum = work[d];
  for (int i = 1; i < PARTS; i++) sum += work[i * DV + d];
  work[d] = sum;
}
float restored = 0.0f;
TQ_BARRIER();
if (run == 0 && d < DV) {
  for (int i = 0; i < DV; i++) restored += work[i] * v_constants[i * DV + d];
}
if (run == 0 && d < DV) {
  const float all = masses[1];
  const float sum = restored + masses[0] * v_constants[V_ROTATION + (q_head / G) * DV + d] + exact_total;
  const int num_queries = plan[about + 1];
  out[((ulong(sequence) * HEADS * G + q_head) * QROWS + query) * DV + d] =
      Out(all > 0.0f && query < num_queries ? sum / all : 0.0f);
}
