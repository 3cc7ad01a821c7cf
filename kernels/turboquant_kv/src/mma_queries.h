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
    for (int i = 0; i < PER; i++) x[i] = float(tq_query_dim(inputs, work, p, int(place.lane) * PER + i));
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
      x = float(tq_query_dim(inputs, work, tq_query_row(inputs, work, i / D), i % D)) * work.step.scale;
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
// Halves alone do where the mean is short (TURN_PARTS 1): a score's share of it is then off by less than 0.02.
constexpr int TURN_HALVES = 2 * TURNED;  // of a row, or of a block in `turns`
constexpr int TURN_PITCH = TURN_PARTS * TURN_HALVES + 8;  // eight more, so that rows begin in different banks
TQ_FN __half* tq_shared_turned(uchar* arena) { return reinterpret_cast<__half*>(arena + TURN_AT); }
TQ_FN void tq_split_half(float x, __half* out) {
  out[0] = __float2half_rn(x);
  if (TURN_PARTS == 2) out[TURN_HALVES] = __float2half_rn(x - __half2float(out[0]));
}
TQ_FN void tq_turn_queries(TqPlace place, TqDecodeInputs inputs, TqWork work, uchar* arena) {
  const float* mean = inputs.k_constants + K_ROTATION + work.head * D;
  for (int i = int(place.tid); i < 8 * TURNED; i += THREADS) {
    const int row = i / TURNED, pair = i % TURNED;
    TqTurnedPair made = {0.0f, 0.0f};
    if (pair < TURN_PAIRS && tq_lives(work, row)) {
      const In* q = tq_query_row(inputs, work, row);
      const int first = tq_first_dim(pair), second = tq_second_dim(pair);
      made = tq_turned_pair(float(tq_query_dim(inputs, work, q, first)) * work.step.scale,
                            float(tq_query_dim(inputs, work, q, second)) * work.step.scale, mean[first], mean[second]);
    }
    __half* out = tq_shared_turned(arena) + row * TURN_PITCH + pair;
    tq_split_half(made.u, out);
    tq_split_half(made.w, out + TURNED);
  }
}

// What the keys of a warp's tiles get for their mean: a product of 16 blocks of tokens, TILE_BLOCKS to a tile, with the
// rows, of which TURNED / 8 steps make the sum. Row i of it is block i % TILE_BLOCKS of tile i / TILE_BLOCKS from a token
// on; tokens past the walk's end are not there. The next group's product is made in steps beside this group's tiles, each
// step's angles asked for before a tile's codes and used behind them: they come from far away.
constexpr int TILE_BLOCKS = TILE / MEAN_BLOCK;
constexpr int TURN_TILES = 16 / TILE_BLOCKS;
constexpr int TURN_STEPS = TURNED / 8;
constexpr int TURN_AT_ONCE = (TURN_STEPS + TURN_TILES - 1) / TURN_TILES;  // steps beside one tile
struct TqTurnAngles {
  uint2 low[TURN_PARTS], high[TURN_PARTS];  // of rows r and r + 8
};
struct TqTurning {
  const uint2 *low_row, *high_row, *queries;
  float now[4], next[4];
  int tile;  // of the group
};
TQ_FN void tq_turn_towards(TqTurning& turning, TqDecodeInputs inputs, TqLane at, int t0, int step, int end) {
  const __half* table = reinterpret_cast<const __half*>(inputs.turns) + at.c * (TURN_HALVES / 4);
  auto block_row = [&](int i) {
    const int token = min(t0 + i / TILE_BLOCKS * step + i % TILE_BLOCKS * MEAN_BLOCK, end - 1);
    return reinterpret_cast<const uint2*>(table + ulong(token / MEAN_BLOCK) * (TURN_PARTS * TURN_HALVES));
  };
  turning.low_row = block_row(at.r);
  turning.high_row = block_row(at.r + 8);
  turning.next[0] = turning.next[1] = turning.next[2] = turning.next[3] = 0.0f;
}
TQ_FN TqTurnAngles tq_ask_angles(const TqTurning& turning, int i) {
  TqTurnAngles asked;
#pragma unroll
  for (int part = 0; part < TURN_PARTS; part++) {
    asked.low[part] = turning.low_row[part * (TURN_HALVES / 4) + i];
    asked.high[part] = turning.high_row[part * (TURN_HALVES / 4) + i];
  }
  return asked;
}
TQ_FN void tq_turn_step(TqTurning& turning, const TqTurnAngles& asked, int i) {
  const uint2 q = turning.queries[i];
#pragma unroll
  for (int part = 0; part < TURN_PARTS; part++) {
    const uint2 a = asked.low[part], b = asked.high[part];
    tq_mma(turning.next, a.x, b.x, a.y, b.y, q.x, q.y);
  }
  if (TURN_PARTS == 2) {
    const uint2 a = asked.low[0], b = asked.high[0], rest = turning.queries[TURN_HALVES / 4 + i];
    tq_mma(turning.next, a.x, b.x, a.y, b.y, rest.x, rest.y);
  }
}
// The first group's product, at once.
TQ_FN TqTurning tq_start_turning(TqDecodeInputs inputs, uchar* arena, TqLane at, int t0, int step, int end) {
  TqTurning turning;
  turning.queries =
      reinterpret_cast<const uint2*>(tq_shared_turned(arena) + at.r * TURN_PITCH + at.c * (TURN_HALVES / 4));
  turning.tile = TURN_TILES;
  tq_turn_towards(turning, inputs, at, t0, step, end);
#pragma unroll
  for (int i = 0; i < TURN_STEPS; i++) tq_turn_step(turning, tq_ask_angles(turning, i), i);
  return turning;
}
// The group of tiles from t0 on begins: its product is there, and the next one's is begun.
TQ_FN void tq_next_turned_group(TqTurning& turning, TqDecodeInputs inputs, TqLane at, int t0, int step, int end) {
#pragma unroll
  for (int i = 0; i < 4; i++) turning.now[i] = turning.next[i];
  turning.tile = 0;
  tq_turn_towards(turning, inputs, at, t0 + TURN_TILES * step, step, end);
}
// What the lane's two rows get for the group's present tile: means + their product with the tile's block.
TQ_FN void tq_turned_means(const TqTurning& turning, TqLane at, float mean_0, float mean_1, float* means) {
  const int row = turning.tile * TILE_BLOCKS;
  const uint from = uint(row % 8 + (at.r >> 1) * BLOCK_TOKENS / MEAN_BLOCK) * 4 + at.c;
  means[0] = mean_0 + tq_shuffle(row < 8 ? turning.now[0] : turning.now[2], from);
  means[1] = mean_1 + tq_shuffle(row < 8 ? turning.now[1] : turning.now[3], from);
}
// Steps of the next group that are made beside a tile of this one.
TQ_FN int tq_first_turn_step(const TqTurning& turning) { return turning.tile * TURN_STEPS / TURN_TILES; }
TQ_FN int tq_last_turn_step(const TqTurning& turning) { return (turning.tile + 1) * TURN_STEPS / TURN_TILES; }

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
