// The merges: a block's warps to its part, and a row group's parts to outputs.
//
// A block's part: each busy warp's totals go to the arena, then everybody adds.
#pragma once
#include "mma_block.h"

// A lane's rows to the arena: sums (WARPS, LIVE, SUMS_PITCH), peaks and masses (WARPS, 8). Dims lie as [dim within the
// lane's eighth][eighth], so that lanes store and add without conflicts.
TQ_FN void tq_store_rows(TqLane at, int warp, const TqMmaRows& rows, float* sums, TqMmaShared& shared) {
  if (at.r == 0) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      shared.peak[warp * 8 + 2 * at.c + i] = rows.peak[i];
      shared.mass[warp * 8 + 2 * at.c + i] = rows.mass[i];
    }
  }
  float* mine = sums + (warp * LIVE + 2 * at.c) * SUMS_PITCH + at.r;
#pragma unroll
  for (int j = 0; j < DV / 16; j++) {
    if (2 * at.c < LIVE) {
      mine[16 * j] = rows.o[j][0];
      mine[16 * j + 8] = rows.o[j][2];
    }
    if (2 * at.c + 1 < LIVE) {
      mine[SUMS_PITCH + 16 * j] = rows.o[j][1];
      mine[SUMS_PITCH + 16 * j + 8] = rows.o[j][3];
    }
  }
}

// Each warp's weight in every row, and the rows' peak and mass to `stats`: a warp a row, a lane a warp's part.
TQ_FN void tq_weigh_warps(TqPlace place, int num_busy, float* stats, TqMmaShared& shared) {
  for (int row = int(place.warp); row < LIVE; row += WARPS) {
    const bool busy = int(place.lane) < num_busy;
    const float peak = busy ? shared.peak[place.lane * 8 + row] : TQ_NO_PEAK;
    const float top = tq_lane_max(peak), weight = busy ? tq_exp2(peak - top) : 0.0f;
    const float mass = tq_lane_sum(busy ? weight * shared.mass[place.lane * 8 + row] : 0.0f);
    if (busy) shared.weight[place.lane * 8 + row] = weight;
    if (place.lane == 0) *reinterpret_cast<float2*>(stats + 2 * row) = make_float2(top, mass);
  }
}

// num_busy: warps that have something to add.
TQ_FN void tq_write_part(TqPlace place, TqWork work, TqMmaRows& rows, int num_busy, uchar* arena, TqMmaShared& shared,
                         float* parts) {
#pragma unroll
  for (int step = 4; step < 32; step <<= 1) {
    rows.mass[0] += __shfl_xor_sync(~0u, rows.mass[0], step);
    rows.mass[1] += __shfl_xor_sync(~0u, rows.mass[1], step);
  }
  __syncthreads();  // nobody reads the arena any more
  float* sums = reinterpret_cast<float*>(arena);
  if (int(place.warp) < num_busy) tq_store_rows(tq_lane(place), int(place.warp), rows, sums, shared);
  __syncthreads();
  const ulong part = tq_part_of(place);
  tq_weigh_warps(place, num_busy, parts + tq_stats_of(work, part), shared);
  __syncthreads();
#pragma unroll
  for (int k = 0; k < (LIVE * DV + THREADS - 1) / THREADS; k++) {
    const int i = int(place.tid) + k * THREADS, row = i / DV, at = i % DV;
    if (i >= LIVE * DV) break;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      if (w < num_busy) sum += shared.weight[w * 8 + row] * sums[(w * LIVE + row) * SUMS_PITCH + at];
    }
    parts[part * (LIVE * DV) + row * DV + at % 8 * (DV / 8) + at / 8] = sum;
  }
}

// Outputs: the row group's last block merges all parts: log-sum-exp, attention sinks, back from the values' rotated basis,
// mean_v. Saves the second launch. A lane's dims are lane + 32 e, e < FINISH_PER.

// v_constants: what rotates values back, V_ROTATION values, then their means (HEADS, DV). counters: one per row group, zero
// between launches; no two launches that may run at the same time are given the same array. out (B, HEADS * G, QROWS, DV).
struct TqFinish {
  const float* v_constants;
  const uint* counters;
  Out* out;
};

constexpr int FINISH_PER = (DV + 31) / 32;
constexpr int BATCH = 8;  // parts whose totals are asked for at once
TQ_FN bool tq_has_dim(uint lane, int e) { return DV % 32 == 0 || int(lane) + 32 * e < DV; }

// Where the merge lies in the arena: each warp's weights, (LIVE, DV) totals of exact rows, (RUNS, LIVE, DV) of the others,
// and the partial sums of a dense rotation.
struct TqFinishArena {
  float *weights, *exact_totals, *work, *partial;
};
TQ_FN TqFinishArena tq_finish_arena(uchar* arena, uint warp) {
  return {reinterpret_cast<float*>(arena) + warp * MAX_PARTS, reinterpret_cast<float*>(arena + EXACT_TOTALS_AT),
          reinterpret_cast<float*>(arena + WORK_AT), reinterpret_cast<float*>(arena + PARTIAL_AT)};
}

// Whether this block is its row group's last to write its part.
TQ_FN bool tq_is_last(TqPlace place, int num_parts, const uint* counters, TqMmaShared& shared) {
  __syncthreads();
  if (place.tid == 0) {
    // The barrier orders the other threads' writes before the count, and the count their later reads.
    uint* counter = const_cast<uint*>(counters) + (int(place.block_z) * HEADS + int(place.block_y));
    shared.num_arrived = int(tq_count(counter));
    if (shared.num_arrived == num_parts - 1) *counter = 0u;
  }
  __syncthreads();
  return shared.num_arrived == num_parts - 1;
}

// Totals of BATCH parts from `first` on, every RUNS-th. totals: a row's of part 0.
TQ_FN void tq_ask_totals(const float* totals, int first, int num_parts, uint lane, float (*x)[FINISH_PER]) {
#pragma unroll
  for (int k = 0; k < BATCH; k++) {
    const int part = first + k * RUNS;
#pragma unroll
    for (int e = 0; e < FINISH_PER; e++) {
      x[k][e] = part < num_parts && tq_has_dim(lane, e) ? __ldcg(totals + part * (LIVE * DV) + lane + 32 * e) : 0.0f;
    }
  }
}

// Merges the parts of one row, of which RUNS warps each take every RUNS-th. Every warp of a row works its weights out for
// itself: they are cheaper than a barrier. Totals are asked for in batches, the first one with the peaks, so that there is
// one wait for both. stats, totals: the row's of part 0. sink: its attention sink's logit.
TQ_FN void tq_merge_row(uint lane, int row, int run, int num_parts, float sink, const float2* stats, const float* totals,
                        TqFinishArena arena, TqMmaShared& shared) {
  float compressed = 0.0f, exact = 0.0f, top = sink, sum[FINISH_PER], exact_total[FINISH_PER], x[BATCH][FINISH_PER];
  const bool has_one = int(lane) < num_parts;
  const float2 first_stats = has_one ? __ldcg(stats + lane * LIVE) : make_float2(TQ_NO_PEAK, 0.0f);
  tq_ask_totals(totals, run, num_parts, lane, x);
  top = fmaxf(top, first_stats.x);
  for (int i = 32 + int(lane); i < num_parts; i += 32) top = fmaxf(top, __ldcg(stats + i * LIVE).x);
  top = tq_lane_max(top);
  __syncwarp();  // before the weights of the job before are overwritten
  for (int i = int(lane); i < num_parts; i += 32) {
    const float2 both = i < 32 ? first_stats : __ldcg(stats + i * LIVE);
    const float weight = tq_exp2(both.x - top);
    arena.weights[i] = weight;
    if (i == 0) exact = weight * both.y;
    else compressed += weight * both.y;
  }
  __syncwarp();
#pragma unroll
  for (int e = 0; e < FINISH_PER; e++) sum[e] = exact_total[e] = 0.0f;
  for (int first = run; first < num_parts; first += BATCH * RUNS) {
    if (first > run) tq_ask_totals(totals, first, num_parts, lane, x);
#pragma unroll
    for (int k = 0; k < BATCH; k++) {
      const int part = first + k * RUNS;
      const float w = part < num_parts ? arena.weights[part] : 0.0f;
#pragma unroll
      for (int e = 0; e < FINISH_PER; e++) {
        if (part == 0) exact_total[e] = w * x[k][e];
        else sum[e] += w * x[k][e];
      }
    }
  }
  if (run == 0) {
    compressed = tq_lane_sum(compressed);
    exact = tq_lane_sum(exact);
    if (lane == 0) {
      shared.compressed[row] = compressed;
      shared.all[row] = compressed + exact + (USE_SINKS ? tq_exp2(sink - top) : 0.0f);
    }
  }
#pragma unroll
  for (int e = 0; e < FINISH_PER; e++) {
    if (tq_has_dim(lane, e)) {
      arena.work[(run * LIVE + row) * DV + lane + 32 * e] = sum[e];
      if (run == 0) arena.exact_totals[row * DV + lane + 32 * e] = exact_total[e];
    }
  }
}

// For dims that are no power of two: the runs' totals added, and back from the rotated basis, by a whole block.
TQ_FN void tq_restore_by_matrix(TqPlace place, const float* rotation, TqFinishArena arena) {
  for (int i = int(place.tid); i < LIVE * DV; i += THREADS) {
    for (int run = 1; run < RUNS; run++) arena.work[i] += arena.work[run * LIVE * DV + i];
  }
  __syncthreads();
  tq_rotate_densely<LIVE, DV, WARPS>(arena.work, rotation, arena.partial, place.warp, place.lane);
  __syncthreads();
  for (int i = int(place.tid); i < LIVE * DV; i += THREADS) arena.work[i] = tq_partial_sum<LIVE, DV, WARPS>(arena.partial, i);
  __syncthreads();
}

// For a power of two, of one row by a warp. sign: the lane's, sign / sqrt(DV).
TQ_FN void tq_restore_by_lanes(uint lane, int row, const float* sign, const float* work, float* x) {
#pragma unroll
  for (int run = 1; run < RUNS; run++) {
#pragma unroll
    for (int e = 0; e < FINISH_PER; e++) x[e] += work[(run * LIVE + row) * DV + lane + 32 * e];
  }
  tq_lane_hadamard<FINISH_PER>(x, lane);
#pragma unroll
  for (int e = 0; e < FINISH_PER; e++) x[e] *= sign[e];
}

// Sinks: a pointer to the query heads' attention sinks.
template <typename Sinks>
TQ_FN void tq_finish(TqPlace place, TqWork work, TqFinish finish, Sinks sinks, const float* parts, uchar* arena_bytes,
                     TqMmaShared& shared) {
  const int num_parts = tq_num_parts(work.step, work.figures);
  float v_sign[FINISH_PER], v_mean[FINISH_PER];  // of the last step, asked for now
#pragma unroll
  for (int e = 0; e < FINISH_PER; e++) {
    const int d = tq_has_dim(place.lane, e) ? int(place.lane) + 32 * e : 0;
    v_sign[e] = finish.v_constants[d];
    v_mean[e] = finish.v_constants[V_ROTATION + work.head * DV + d];
  }
  if (!tq_is_last(place, num_parts, finish.counters, shared)) return;

  const TqFinishArena arena = tq_finish_arena(arena_bytes, place.warp);
  const int row_group = int(place.block_z) * HEADS + int(place.block_y);
  const ulong first_row = ulong(row_group) * place.num_blocks_x * LIVE;
  const float* stats = parts + ulong(work.step.num_parts) * (LIVE * DV) + first_row * 2;
  const float* totals = parts + first_row * DV;
  for (int job = int(place.warp); job < LIVE * RUNS; job += WARPS) {
    const int row = job % LIVE, index = tq_group_row(work, row);
    const bool has_sink = USE_SINKS && index < GROUP_ROWS;
    const float sink = has_sink ? float(sinks[work.head * G + index / QROWS]) * LOG2_E : TQ_NO_PEAK;
    tq_merge_row(place.lane, row, job / LIVE, num_parts, sink, reinterpret_cast<const float2*>(stats) + row,
                 totals + row * DV, arena, shared);
  }
  __syncthreads();
  if (!tq_is_power_of_two(DV)) tq_restore_by_matrix(place, finish.v_constants, arena);
  for (int row = int(place.warp); row < LIVE; row += WARPS) {
    float x[FINISH_PER];
#pragma unroll
    for (int e = 0; e < FINISH_PER; e++) x[e] = tq_has_dim(place.lane, e) ? arena.work[row * DV + place.lane + 32 * e] : 0.0f;
    if (tq_is_power_of_two(DV)) tq_restore_by_lanes(place.lane, row, v_sign, arena.work, x);
    const int index = tq_group_row(work, row), query = tq_query_of(work, row);
    const float all = shared.all[row];
    Out* to = finish.out + ((ulong(work.sequence) * HEADS * G + work.head * G + index / QROWS) * QROWS + query) * DV;
#pragma unroll
    for (int e = 0; e < FINISH_PER; e++) {
      const int d = int(place.lane) + 32 * e;
      if (index < GROUP_ROWS && tq_has_dim(place.lane, e)) {
        const float sum = x[e] + shared.compressed[row] * v_mean[e] + arena.exact_totals[row * DV + d];
        to[d] = Out(all > 0.0f && query < work.figures.num_queries ? sum / all : 0.0f);
      }
    }
  }
}
