// The block's queries, rotated, as halves in shared memory, and q . mean_k of each row: of the dims that turn, what gives
// it for any block of tokens. Rows that do not exist are zero.
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
      const int d = int(place.lane) * PER + i;
      if (d >= 2 * TURN_PAIRS) dot += x[i] * constants[K_ROTATION + work.head * D + d];
      x[i] *= constants[d];
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
    for (int d = 2 * TURN_PAIRS + int(place.lane); d < D; d += 32) {
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

// Of rows and pairs that turn, u, then w, as halves, and behind both what the halves left out: (8, TURN_PITCH) at TURN_AT.
constexpr int TURN_PITCH = 4 * TURNED + 8;  // eight more, so that rows begin in different banks
TQ_FN __half* tq_shared_turned(uchar* arena) { return reinterpret_cast<__half*>(arena + TURN_AT); }
TQ_FN void tq_split_half(float x, __half* high, __half* low) {
  *high = __float2half_rn(x);
  *low = __float2half_rn(x - __half2float(*high));
}
TQ_FN void tq_turn_queries(TqPlace place, TqDecodeInputs inputs, TqWork work, uchar* arena) {
  const float* mean = inputs.k_constants + K_ROTATION + work.head * D;
  for (int i = int(place.tid); i < 8 * TURNED; i += THREADS) {
    const int row = i / TURNED, pair = i % TURNED;
    TqTurnedPair made = {0.0f, 0.0f};
    if (pair < TURN_PAIRS && tq_lives(work, row)) {
      const In* q = tq_query_row(inputs, work, row);
      const int first = tq_first_dim(pair), second = tq_second_dim(pair);
      made = tq_turned_pair(float(q[first * inputs.dim_stride]) * work.step.scale,
                            float(q[second * inputs.dim_stride]) * work.step.scale, mean[first], mean[second]);
    }
    __half* out = tq_shared_turned(arena) + row * TURN_PITCH + pair;
    tq_split_half(made.u, out, out + 2 * TURNED);
    tq_split_half(made.w, out + TURNED, out + 3 * TURNED);
  }
}

// What the keys of the warp's next tiles get for their mean: a product of 16 blocks of tokens, TILE_BLOCKS to a tile, with
// the rows. Row i of it is block i % TILE_BLOCKS of tile i / TILE_BLOCKS from token t0 on; tokens past `end` are not there.
// Halves do not hold scores of a large mean, so each factor is two of them.
constexpr int TILE_BLOCKS = TILE / MEAN_BLOCK;
constexpr int TURNED_TILES = 16 / TILE_BLOCKS;
TQ_FN void tq_mean_scores(TqDecodeInputs inputs, uchar* arena, TqLane at, int t0, int step, int end, float* s) {
  const __half* table = reinterpret_cast<const __half*>(inputs.turns) + at.c * (TURNED / 2);
  auto block_row = [&](int i) {
    const int token = min(t0 + i / TILE_BLOCKS * step + i % TILE_BLOCKS * MEAN_BLOCK, end - 1);
    return reinterpret_cast<const uint2*>(table + ulong(token / MEAN_BLOCK) * (4 * TURNED));
  };
  const uint2 *low_rows = block_row(at.r), *high_rows = block_row(at.r + 8);
  const uint2* turned =
      reinterpret_cast<const uint2*>(tq_shared_turned(arena) + at.r * TURN_PITCH + at.c * (TURNED / 2));
  constexpr int REST = TURNED / 2;  // uint2 from halves to what they left out
  s[0] = s[1] = s[2] = s[3] = 0.0f;
#pragma unroll
  for (int i = 0; i < TURNED / 8; i++) {
    const uint2 a = low_rows[i], b = high_rows[i], a_rest = low_rows[REST + i], b_rest = high_rows[REST + i];
    const uint2 q = turned[i], q_rest = turned[REST + i];
    tq_mma(s, a.x, b.x, a.y, b.y, q.x, q.y);
    tq_mma(s, a_rest.x, b_rest.x, a_rest.y, b_rest.y, q.x, q.y);
    tq_mma(s, a.x, b.x, a.y, b.y, q_rest.x, q_rest.y);
  }
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
