// A block's part: the warps' rows become one. Each busy warp's totals go to the arena, then everybody adds.
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
