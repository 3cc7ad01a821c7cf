// One block per query row, for a power of two of dims: all parts by log-sum-exp, attention sinks, back from the values'
// rotated basis, mean_v. A warp takes every eighth part, a lane every 32nd dim; part 0 is the exact rows'.
const int WARPS = 8;
const int PER = DV / 32;
const int CHUNKS = (G * QROWS + ROWS - 1) / ROWS;
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
const TQ_DEVICE float* totals = parts + first_row * DV + lane;
const float sink = USE_SINKS ? float(sinks[q_head]) * 1.44269504f : TQ_NO_PEAK;

TQ_SHARED_ARRAY(float, work, WARPS * DV);
float top = sink;
for (int i = int(lane); i < num_parts; i += 32) top = tq_max(top, stats[i * 2 * LIVE]);
top = tq_lane_max(top);
float sum[PER], exact_weight = 0.0f, exact = 0.0f, compressed = 0.0f;
for (int e = 0; e < PER; e++) sum[e] = 0.0f;
for (int base = 0; base < num_parts; base += 32) {
  const int i = base + int(lane);
  const float weight = i < num_parts ? tq_exp2(stats[i * 2 * LIVE] - top) : 0.0f;
  const float mass = i < num_parts ? weight * stats[i * 2 * LIVE + 1] : 0.0f;
  if (i == 0) {
    exact_weight = weight;
    exact = mass;
  } else {
    compressed += mass;
  }
  const int last = num_parts - base < 32 ? num_parts - base : 32;
#pragma unroll 4
  for (int j = int(warp); j < last; j += WARPS) {
    const float w = base + j == 0 ? 0.0f : tq_shuffle(weight, uint(j));
    const TQ_DEVICE float* from = totals + ulong(base + j) * (LIVE * DV);
    for (int e = 0; e < PER; e++) sum[e] += w * from[32 * e];
  }
}
for (int e = 0; e < PER; e++) work[warp * DV + lane + 32 * e] = sum[e];
TQ_BARRIER();
if (warp == 0) {
  for (int e = 0; e < PER; e++) {
    for (int w = 1; w < WARPS; w++) sum[e] += work[w * DV + lane + 32 * e];
  }
  tq_lane_hadamard<PER>(sum, lane);
  compressed = tq_lane_sum(compressed);
  exact = tq_shuffle(exact, 0u);
  exact_weight = tq_shuffle(exact_weight, 0u);
  const float all = compressed + exact + (USE_SINKS ? tq_exp2(sink - top) : 0.0f);
  const bool lives = all > 0.0f && query < plan[about + 1];
  for (int e = 0; e < PER; e++) {
    const int d = int(lane) + 32 * e;
    const float x = sum[e] * v_constants[d] + compressed * v_constants[V_ROTATION + (q_head / G) * DV + d] +
        exact_weight * totals[32 * e];
    out[((ulong(sequence) * HEADS * G + q_head) * QROWS + query) * DV + d] = Out(lives ? x / all : 0.0f);
  }
}
