// The row group's last block merges all parts: log-sum-exp, attention sinks, back from the values' rotated basis,
// mean_v. Saves the second launch. counters: one per row group, zero between launches; no two launches that may run at
// the same time are given the same array.
__threadfence();
__syncthreads();
__shared__ int num_arrived;
const int row_group = int(block_z) * HEADS + int(block_y);
const int num_parts = 1 + (num_tiles > tile_0 ? (num_tiles - tile_0 + tiles_per_block - 1) / tiles_per_block : 0);
uint* counter = const_cast<uint*>(counters) + row_group;
if (tid == 0) num_arrived = int(atomicAdd(counter, 1u));
__syncthreads();
if (num_arrived != num_parts - 1) return;
if (tid == 0) *counter = 0u;
__threadfence();

const int PER = DV / 32;
const ulong first_row = ulong(row_group) * num_blocks_x * LIVE;
const float* stats = parts + ulong(plan[3]) * (LIVE * DV) + first_row * 2;
const float* totals = parts + first_row * DV + lane;
float* weights = reinterpret_cast<float*>(arena);  // (LIVE, MAX_PARTS)
float* work = weights + 8 * MAX_PARTS;             // (WARPS, LIVE, DV)
__shared__ float row_compressed[8], row_all[8];
for (int row = int(warp); row < LIVE; row += WARPS) {
  const int index = chunk * 8 + row;
  const float sink = USE_SINKS && index < GROUP_ROWS ? float(sinks[head * G + index / QROWS]) * 1.44269504f : TQ_NO_PEAK;
  float top = sink;
  for (int i = int(lane); i < num_parts; i += 32) {
    const float peak = __ldcg(stats + (i * LIVE + row) * 2);
    weights[row * MAX_PARTS + i] = peak;
    top = fmaxf(top, peak);
  }
  top = tq_lane_max(top);
  float compressed = 0.0f, exact = 0.0f;
  for (int i = int(lane); i < num_parts; i += 32) {
    const float weight = tq_exp2(weights[row * MAX_PARTS + i] - top);
    weights[row * MAX_PARTS + i] = weight;
    const float mass = weight * __ldcg(stats + (i * LIVE + row) * 2 + 1);
    if (i == 0) exact = mass;
    else compressed += mass;
  }
  compressed = tq_lane_sum(compressed);
  exact = tq_lane_sum(exact);
  if (lane == 0) {
    row_compressed[row] = compressed;
    row_all[row] = compressed + exact + (USE_SINKS ? tq_exp2(sink - top) : 0.0f);
  }
}
__syncthreads();
float sum[LIVE][PER];
#pragma unroll
for (int row = 0; row < LIVE; row++) {
#pragma unroll
  for (int e = 0; e < PER; e++) sum[row][e] = 0.0f;
}
#pragma unroll 2
for (int i = 1 + int(warp); i < num_parts; i += WARPS) {
#pragma unroll
  for (int row = 0; row < LIVE; row++) {
    const float weight = weights[row * MAX_PARTS + i];
#pragma unroll
    for (int e = 0; e < PER; e++) sum[row][e] += weight * __ldcg(totals + ulong(i * LIVE + row) * DV + 32 * e);
  }
}
#pragma unroll
for (int row = 0; row < LIVE; row++) {
#pragma unroll
  for (int e = 0; e < PER; e++) work[(int(warp) * LIVE + row) * DV + lane + 32 * e] = sum[row][e];
}
__syncthreads();
for (int row = int(warp); row < LIVE; row += WARPS) {
  const int index = chunk * 8 + row, query = index % QROWS;
  float x[PER];
#pragma unroll
  for (int e = 0; e < PER; e++) {
    x[e] = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) x[e] += work[(w * LIVE + row) * DV + lane + 32 * e];
  }
  tq_lane_hadamard<PER>(x, lane);
  const float all = row_all[row];
  const float factor = all > 0.0f && query < num_queries ? 1.0f / all : 0.0f;
#pragma unroll
  for (int e = 0; e < PER; e++) {
    const int d = int(lane) + 32 * e;
    const float value = x[e] * v_constants[d] + row_compressed[row] * v_constants[V_ROTATION + head * DV + d] +
        weights[row * MAX_PARTS] * __ldcg(totals + ulong(row) * DV + 32 * e);
    if (index < GROUP_ROWS) {
      out[((ulong(sequence) * HEADS * G + head * G + index / QROWS) * QROWS + query) * DV + d] =
          Out(factor > 0.0f ? value * factor : 0.0f);
    }
  }
}
