// The row group's last block merges all parts: log-sum-exp, attention sinks, back from the values' rotated basis,
// mean_v. Saves the second launch. counters: one per row group, zero between launches; no two launches that may run at
// the same time are given the same array.
__shared__ int num_arrived;
const int row_group = int(block_z) * HEADS + int(block_y);
const int num_parts = 1 + (num_tiles > tile_0 ? (num_tiles - tile_0 + tiles_per_block - 1) / tiles_per_block : 0);
const int PER = (DV + 31) / 32;
float v_sign[PER], v_mean[PER];  // of the last step, asked for now; lane's dims are lane + 32 e everywhere below
#pragma unroll
for (int e = 0; e < PER; e++) {
  const int d = DV % 32 == 0 || int(lane) + 32 * e < DV ? int(lane) + 32 * e : 0;
  v_sign[e] = v_constants[d];
  v_mean[e] = v_constants[V_ROTATION + head * DV + d];
}
__syncthreads();
if (tid == 0) {
  // The barrier orders the other threads' writes before the count, and the count their later reads.
  uint* counter = const_cast<uint*>(counters) + row_group;
  num_arrived = int(tq_count(counter));
  if (num_arrived == num_parts - 1) *counter = 0u;
}
__syncthreads();
if (num_arrived != num_parts - 1) return;

const int RUNS = WARPS > LIVE ? WARPS / LIVE : 1;  // warps that share a row's parts
const ulong first_row = ulong(row_group) * num_blocks_x * LIVE;
const float* stats = parts + ulong(plan[3]) * (LIVE * DV) + first_row * 2;
const float* totals = parts + first_row * DV;
float* weights = reinterpret_cast<float*>(arena);   // (WARPS, MAX_PARTS)
float* exact_totals = weights + WARPS * MAX_PARTS;  // (LIVE, DV)
float* work = exact_totals + LIVE * DV;             // (RUNS, LIVE, DV)
__shared__ float row_compressed[8], row_all[8];
for (int job = int(warp); job < LIVE * RUNS; job += WARPS) {
  // Every warp of a row works its weights out for itself: they are cheaper than a barrier. Totals are asked for in
  // batches, the first one with the peaks, so that there is one wait for both.
  const int BATCH = 8, my_row = job % LIVE, my_run = job / LIVE;
  const int index = chunk * 8 + my_row;
  const float sink = USE_SINKS && index < GROUP_ROWS ? TQ_SINK_OF(head * G + index / QROWS) * 1.44269504f : TQ_NO_PEAK;
  const float2* my_stats = reinterpret_cast<const float2*>(stats) + my_row;
  const float* my_totals = totals + my_row * DV + lane;
  float compressed = 0.0f, exact = 0.0f, top = sink, sum[PER], exact_total[PER], x[BATCH][PER];
  auto ask = [&](int first) {
#pragma unroll
    for (int k = 0; k < BATCH; k++) {
      const int part = first + k * RUNS;
#pragma unroll
      for (int e = 0; e < PER; e++) {
        const bool held = part < num_parts && (DV % 32 == 0 || int(lane) + 32 * e < DV);
        x[k][e] = held ? __ldcg(my_totals + part * (LIVE * DV) + 32 * e) : 0.0f;
      }
    }
  };
  const bool has_one = int(lane) < num_parts;
  const float2 first_stats = has_one ? __ldcg(my_stats + lane * LIVE) : make_float2(TQ_NO_PEAK, 0.0f);
  ask(my_run);
  top = fmaxf(top, first_stats.x);
  for (int i = 32 + int(lane); i < num_parts; i += 32) top = fmaxf(top, __ldcg(my_stats + i * LIVE).x);
  top = tq_lane_max(top);
  __syncwarp();  // before the weights of the job before are overwritten
  for (int i = int(lane); i < num_parts; i += 32) {
    const float2 both = i < 32 ? first_stats : __ldcg(my_stats + i * LIVE);
    const float weight = tq_exp2(both.x - top);
    weights[warp * MAX_PARTS + i] = weight;
    if (i == 0) exact = weight * both.y;
    else compressed += weight * both.y;
  }
  __syncwarp();
#pragma unroll
  for (int e = 0; e < PER; e++) sum[e] = exact_total[e] = 0.0f;
  for (int first = my_run; first < num_parts; first += BATCH * RUNS) {
    if (first > my_run) ask(first);
#pragma unroll
    for (int k = 0; k < BATCH; k++) {
      const int part = first + k * RUNS;
      const float w = part < num_parts ? weights[warp * MAX_PARTS + part] : 0.0f;
#pragma unroll
      for (int e = 0; e < PER; e++) {
        if (part == 0) exact_total[e] = w * x[k][e];
        else sum[e] += w * x[k][e];
      }
    }
  }
  if (my_run == 0) {
    compressed = tq_lane_sum(compressed);
    exact = tq_lane_sum(exact);
    if (lane == 0) {
      row_compressed[my_row] = compressed;
      row_all[my_row] = compressed + exact + (USE_SINKS ? tq_exp2(sink - top) : 0.0f);
    }
  }
#pragma unroll
  for (int e = 0; e < PER; e++) {
    if (DV % 32 == 0 || int(lane) + 32 * e < DV) {
      work[(my_run * LIVE + my_row) * DV + lane + 32 * e] = sum[e];
      if (my_run == 0) exact_totals[my_row * DV + lane + 32 * e] = exact_total[e];
    }
  }
}
__syncthreads();
if ((DV & (DV - 1)) != 0) {
  float* partial = work + RUNS * LIVE * DV;
  for (int i = int(tid); i < LIVE * DV; i += THREADS) {
    for (int run = 1; run < RUNS; run++) work[i] += work[run * LIVE * DV + i];
  }
  __syncthreads();
  tq_rotate_densely<LIVE, DV, WARPS>(work, v_constants, partial, warp, lane);
  __syncthreads();
  for (int i = int(tid); i < LIVE * DV; i += THREADS) work[i] = tq_partial_sum<LIVE, DV, WARPS>(partial, i);
  __syncthreads();
}
for (int row = int(warp); row < LIVE; row += WARPS) {
  float x[PER];
#pragma unroll
  for (int e = 0; e < PER; e++) {
    x[e] = DV % 32 == 0 || int(lane) + 32 * e < DV ? work[row * DV + lane + 32 * e] : 0.0f;
  }
  if ((DV & (DV - 1)) == 0) {
#pragma unroll
    for (int run = 1; run < RUNS; run++) {
#pragma unroll
      for (int e = 0; e < PER; e++) x[e] += work[(run * LIVE + row) * DV + lane + 32 * e];
    }
    tq_lane_hadamard<PER>(x, lane);
#pragma unroll
    for (int e = 0; e < PER; e++) x[e] *= v_sign[e];
  }
  const int index = chunk * 8 + row, query = index % QROWS;
  const float all = row_all[row];
  Out* to = out + ((ulong(sequence) * HEADS * G + head * G + index / QROWS) * QROWS + query) * DV;
#pragma unroll
  for (int e = 0; e < PER; e++) {
    const int d = int(lane) + 32 * e;
    if (index < GROUP_ROWS && (DV % 32 == 0 || d < DV)) {
      const float sum = x[e] + row_compressed[row] * v_mean[e] + exact_totals[row * DV + d];
      to[d] = Out(all > 0.0f && query < num_queries ? sum / all : 0.0f);
    }
  }
}
