// The block's queries, rotated, as halves in shared memory, and q . mean_k of each row. Rows that do not exist are zero.
#pragma once
#include "mma_block.h"

// What a lane multiplies its keys with: a quarter of row r's dims, and the means' share of rows 2c and 2c + 1.
struct TqQueryFragments {
  uint pairs[D / 8];
  float mean_0, mean_1;
};

TQ_FN __half* tq_shared_queries(uchar* arena) { return reinterpret_cast<__half*>(arena + QUERIES_AT); }

// For a power of two of dims, a warp a row: a lane holds D / 32 neighbours, the Hadamard butterfly runs in registers and
// over lanes.
TQ_FN void tq_rotate_by_lanes(TqPlace place, TqDecodeInputs inputs, TqWork work, __half* out, float* means) {
  const int PER = D / 32;
  const float* constants = inputs.k_constants;
  for (int row = int(place.warp); row < 8; row += WARPS) {
    float x[PER], dot = 0.0f;
    // Read before the plan is known; what does not live is dropped afterwards.
    const In* p = tq_query_row(inputs, work, row);
#pragma unroll
    for (int i = 0; i < PER; i++) x[i] = float(p[(place.lane * PER + i) * inputs.dim_stride]);
    const bool lives = tq_lives(work, row);
#pragma unroll
    for (int i = 0; i < PER; i++) x[i] = lives ? x[i] * work.step.scale : 0.0f;
#pragma unroll
    for (int i = 0; i < PER; i++) {
      dot += x[i] * constants[K_ROTATION + work.head * D + place.lane * PER + i];
      x[i] *= constants[place.lane * PER + i];
    }
    dot = tq_lane_sum(dot);
    tq_lane_hadamard<PER>(x, place.lane);
#pragma unroll
    for (int i = 0; i < PER; i += 2) {
      *reinterpret_cast<uint*>(out + row * Q_PITCH + place.lane * PER + i) = tq_half_pair(x[i], x[i + 1]);
    }
    if (place.lane == 0) means[row] = dot;
  }
}

// For other dims, by a whole block. scratch: where the rings begin later, 8 * D floats and as many for each warp.
TQ_FN void tq_rotate_by_matrix(TqPlace place, TqDecodeInputs inputs, TqWork work, float* scratch, __half* out,
                               float* means) {
  float *plain = scratch, *partial = scratch + 8 * D;
  for (int i = int(place.tid); i < 8 * D; i += THREADS) {
    float x = 0.0f;
    if (tq_lives(work, i / D)) {
      x = float(tq_query_row(inputs, work, i / D)[(i % D) * inputs.dim_stride]) * work.step.scale;
    }
    plain[i] = x;
  }
  __syncthreads();
  for (int row = int(place.warp); row < 8; row += WARPS) {
    float dot = 0.0f;
    for (int d = int(place.lane); d < D; d += 32) {
      dot += plain[row * D + d] * inputs.k_constants[K_ROTATION + work.head * D + d];
    }
    dot = tq_lane_sum(dot);
    if (place.lane == 0) means[row] = dot;
  }
  // stored transposed: threads read neighbours
  tq_rotate_densely<8, D, WARPS>(plain, inputs.k_constants, partial, place.warp, place.lane);
  __syncthreads();
  for (int i = int(place.tid); i < 8 * D; i += THREADS) {
    out[i / D * Q_PITCH + i % D] = __float2half_rn(tq_partial_sum<8, D, WARPS>(partial, i));
  }
  __syncthreads();
}

TQ_FN void tq_rotate_queries(TqPlace place, TqDecodeInputs inputs, TqWork work, uchar* arena, float* means) {
  __half* out = tq_shared_queries(arena);
  if (tq_is_power_of_two(D)) tq_rotate_by_lanes(place, inputs, work, out, means);
  else tq_rotate_by_matrix(place, inputs, work, reinterpret_cast<float*>(arena + RINGS_AT), out, means);
}

TQ_FN TqQueryFragments tq_query_fragments(TqLane at, const __half* queries, const float* means) {
  TqQueryFragments made;
#pragma unroll
  for (int i = 0; i < D / 8; i++) {
    made.pairs[i] = reinterpret_cast<const uint*>(queries + at.r * Q_PITCH + at.c * (D / 4))[i];
  }
  made.mean_0 = means[2 * at.c];
  made.mean_1 = means[2 * at.c + 1];
  return made;
}
