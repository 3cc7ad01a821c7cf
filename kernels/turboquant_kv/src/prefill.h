// Prefill on tensor cores over a decoded history (FlashAttention-2, arXiv 2307.08691): a walk over tiles of columns,
// STAGES - 1 copies ahead: scores, online softmax in base 2, weighted sums. Queries stay in shared memory, because
// registers are full of sums. Dynamic shared memory is laid out by backends/gpu/arena.py: queries, STAGES tiles of keys
// from KEYS_AT on, as many of values from VALUES_AT on; K_PITCH and V_PITCH are pieces of a row.
#pragma once
#include "fragments_cuda.h"
#include "prefill_tiles.h"
#include "softmax.h"

constexpr int M_TILES = WARP_ROWS / 16;
constexpr int THREADS = 32 * WARPS;
constexpr int K_CHUNKS = D / 8, V_CHUNKS = DV / 8;  // pieces that a row has in memory

// queries (sequences, HEADS * G, num_rows, D); keys (rows, D) and values (rows, DV) of all histories, of each sequence
// (HEADS, num_columns) from its first_row on; figures: TqPrefillFigures of each sequence; sinks (HEADS * G,).
struct TqPrefillInputs {
  const In *queries, *keys, *values;
  const int* figures;
  const float* sinks;
};

// A lane's rows r and r + 8 of M_TILES fragments, dims 8 j + 2 c and the next. Peaks are scores before the scale, known to
// all lanes of a row; masses are the lane's share.
struct TqSums {
  float o[M_TILES][DV / 8][4], peak[M_TILES][2], mass[M_TILES][2];
};
TQ_FN void tq_start(TqSums& sums) {
#pragma unroll
  for (int m = 0; m < M_TILES; m++) {
#pragma unroll
    for (int j = 0; j < DV / 8; j++) sums.o[m][j][0] = sums.o[m][j][1] = sums.o[m][j][2] = sums.o[m][j][3] = 0.0f;
    sums.peak[m][0] = sums.peak[m][1] = TQ_NO_PEAK;
    sums.mass[m][0] = sums.mass[m][1] = 0.0f;
  }
}

// Which row and which of two pieces a lane's address names to an instruction that loads four 8x8 matrices: in queries and
// values the four are two by two rows first (tall), in keys pieces first (wide). Bits as tq_lane_piece takes them.
struct TqAddresses {
  int tall_row, wide_row;
  uint tall_bits, wide_bits;
};
TQ_FN TqAddresses tq_addresses(uint lane) {
  return {int(lane) & 15, (int(lane) & 7) + int(lane >> 4) * 8, 16 * ((lane >> 4) ^ (lane & 7)),
          16 * (((lane >> 3) & 1) ^ (lane & 7))};
}

TQ_FN int tq_slot_of(int tile) { return STAGES == 2 ? tile & 1 : tile % STAGES; }
TQ_FN uchar* tq_key_tile(uchar* arena, int tile) { return arena + KEYS_AT + tq_slot_of(tile) * K_TILE_BYTES; }
TQ_FN uchar* tq_value_tile(uchar* arena, int tile) { return arena + VALUES_AT + tq_slot_of(tile) * V_TILE_BYTES; }

// Asks for a block's queries; rows that do not live are zeros.
TQ_FN void tq_copy_queries(TqPlace place, const In* queries, int first, int num_queries, uchar* arena) {
  for (int i = int(place.tid); i < BLOCK_ROWS * K_CHUNKS; i += THREADS) {
    const int row = i / K_CHUNKS, chunk = i % K_CHUNKS, query = first + row;
    uchar* to = arena + tq_piece<K_PITCH>(row, chunk);
    if (query >= 0 && query < num_queries) tq_copy<16>(to, queries + query * D + 8 * chunk);
    else *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
  }
}

// Asks for a tile of keys and values.
TQ_FN void tq_copy_tile(const TqPrefillInputs& inputs, const TqWalk& walk, uchar* arena, int tile, int tid) {
  const int column = tq_column_of(walk, tile), last = walk.num_columns - 1 - column;
  const ulong first_row = ulong(walk.first_row + column);
  uchar *to_keys = tq_key_tile(arena, tile), *to_values = tq_value_tile(arena, tile);
  const In *from_keys = inputs.keys + first_row * D, *from_values = inputs.values + first_row * DV;
  if (last >= COLUMNS - 1) {
    tq_copy_rows<true, K_CHUNKS, COLUMNS, THREADS>(to_keys, from_keys, last, tid);
    tq_copy_rows<true, V_CHUNKS, COLUMNS, THREADS>(to_values, from_values, last, tid);
  } else {  // the history's end
    tq_copy_rows<false, K_CHUNKS, COLUMNS, THREADS>(to_keys, from_keys, last, tid);
    tq_copy_rows<false, V_CHUNKS, COLUMNS, THREADS>(to_values, from_values, last, tid);
  }
}

// Scores s of a warp's rows by a tile's columns. lane_queries: the lane's row of the warp's first fragment.
TQ_FN void tq_score(const uchar* lane_queries, const uchar* keys, TqAddresses at, float (*s)[COLUMNS / 8][4]) {
  const uchar* lane_keys = keys + at.wide_row * (16 * K_PITCH);
#pragma unroll
  for (int m = 0; m < M_TILES; m++) {
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) s[m][j][0] = s[m][j][1] = s[m][j][2] = s[m][j][3] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    uint a[M_TILES][4];
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
      tq_load_matrices(a[m], tq_lane_piece(lane_queries, at.tall_bits, 2 * i) + 16 * m * (16 * K_PITCH));
    }
#pragma unroll
    for (int j = 0; j < COLUMNS / 16; j++) {
      uint b[4];
      tq_load_matrices(b, tq_lane_piece(lane_keys, at.wide_bits, 2 * i) + 16 * j * (16 * K_PITCH));
#pragma unroll
      for (int m = 0; m < M_TILES; m++) {
        tq_mma_as<In>(s[m][2 * j], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
        tq_mma_as<In>(s[m][2 * j + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
      }
    }
  }
}

// Scores before the scale, capped.
TQ_FN void tq_cap(float (*s)[COLUMNS / 8][4], float cap) {
#pragma unroll
  for (int m = 0; m < M_TILES; m++) {
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
#pragma unroll
      for (int i = 0; i < 4; i++) s[m][j][i] = tq_capped(s[m][j][i], cap);
    }
  }
}

// Masks what a row does not see of a tile.
TQ_FN void tq_mask(const TqWalk& walk, const int* figures, int warp_start, int tile, TqLane at, float (*s)[COLUMNS / 8][4]) {
  const int section = tq_section_of(walk, tile), column = tq_column_of(walk, tile) + 2 * at.c;
#pragma unroll
  for (int m = 0; m < M_TILES; m++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int position = warp_start + 16 * m + 8 * h + at.r;
      const int low = tq_low_of(figures, section, position) - column;
      const uint span = max(0, tq_high_of(figures, section, position) - column - low);
#pragma unroll
      for (int j = 0; j < COLUMNS / 4; j++) {
        if (uint(j / 2 * 8 + j % 2 - low) >= span) s[m][j / 2][2 * h + j % 2] = TQ_MASKED;
      }
    }
  }
}

// Sums of fragment m fade towards new peaks.
TQ_FN void tq_fade(TqSums& sums, int m, const float* peaks, float scale) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float fade = tq_exp2((sums.peak[m][h] - peaks[h]) * scale);
    sums.peak[m][h] = peaks[h];
    sums.mass[m][h] *= fade;
#pragma unroll
    for (int j = 0; j < DV / 8; j++) {
      sums.o[m][j][2 * h] *= fade;
      sums.o[m][j][2 * h + 1] *= fade;
    }
  }
}

// Scores to weights p, 16-bit pairs. Sums fade only when a peak of the warp rises, which late tiles seldom do.
TQ_FN void tq_weigh(TqSums& sums, const float (*s)[COLUMNS / 8][4], float scale, uint (*p)[COLUMNS / 8][2]) {
#pragma unroll
  for (int m = 0; m < M_TILES; m++) {
    float next[2], offset[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      next[h] = sums.peak[m][h];
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; j++) next[h] = fmaxf(next[h], fmaxf(s[m][j][2 * h], s[m][j][2 * h + 1]));
      next[h] = fmaxf(next[h], __shfl_xor_sync(~0u, next[h], 1));
      next[h] = fmaxf(next[h], __shfl_xor_sync(~0u, next[h], 2));
      offset[h] = next[h] * scale;
    }
    if (__any_sync(~0u, next[0] > sums.peak[m][0] || next[1] > sums.peak[m][1])) tq_fade(sums, m, next, scale);
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float x = tq_exp2(s[m][j][2 * h] * scale - offset[h]);
        const float y = tq_exp2(s[m][j][2 * h + 1] * scale - offset[h]);
        sums.mass[m][h] += x + y;
        p[m][j][h] = tq_pair_as<In>(x, y);
      }
    }
  }
}

// Adds a tile's values with weights p: two neighbouring fragments of weights are one of the product. The row goes through
// a shuffle, because a compiler that knows which of its bits are zero computes more addresses than it needs.
TQ_FN void tq_add_values(TqSums& sums, const uint (*p)[COLUMNS / 8][2], const uchar* values, TqAddresses at, uint lane) {
  const uchar* lane_values = values + int(tq_shuffle(uint(at.tall_row) * 16 * V_PITCH, lane));
#pragma unroll
  for (int i = 0; i < COLUMNS / 16; i++) {
#pragma unroll
    for (int j = 0; j < DV / 16; j++) {
      uint b[4];
      tq_load_matrices_transposed(b, tq_lane_piece(lane_values, at.tall_bits, 2 * j) + 16 * i * (16 * V_PITCH));
#pragma unroll
      for (int m = 0; m < M_TILES; m++) {
        const uint *low = p[m][2 * i], *high = p[m][2 * i + 1];
        tq_mma_as<In>(sums.o[m][2 * j], low[0], low[1], high[0], high[1], b[0], b[1]);
        tq_mma_as<In>(sums.o[m][2 * j + 1], low[0], low[1], high[0], high[1], b[2], b[3]);
      }
    }
  }
}

// Sums to outputs: the attention sink joins the mass, rows past the queries are zeros. out: of the head, (num_rows, DV).
// first: the query of the warp's first row; sink: its head's logit.
TQ_FN void tq_write(const TqSums& sums, TqLane at, int first, int num_queries, int num_rows, float scale, float sink, In* out) {
#pragma unroll
  for (int m = 0; m < M_TILES; m++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float total = sums.mass[m][h];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const float mine = sums.peak[m][h] * scale, top = fmaxf(mine, sink), share = tq_exp2(mine - top);
      const float factor = share / (total * share + tq_exp2(sink - top));
      const int query = first + 16 * m + 8 * h + at.r;
      if (query < 0 || query >= num_rows) continue;
      In* to = out + query * DV + 2 * at.c;
#pragma unroll
      for (int j = 0; j < DV / 8; j++) {
        const float x = sums.o[m][j][2 * h] * factor, y = sums.o[m][j][2 * h + 1] * factor;
        *reinterpret_cast<uint*>(to + 8 * j) = query < num_queries ? tq_pair_as<In>(x, y) : 0u;
      }
    }
  }
}

// out (sequences, HEADS * G, num_rows, DV).
TQ_FN void tq_prefill(TqPlace place, TqPrefillInputs inputs, In* out) {
  __shared__ TqWalk walk;  // here, because registers are scarce
  __shared__ int plain_until[WARPS];
  uchar* arena = tq_arena();
  inputs.figures += place.block_z * PREFILL_WORDS;
  const TqPrefillFigures figures = tq_prefill_figures(inputs.figures);
  const int q_start = figures.q_start - SINK, head = int(place.block_y);
  const TqRun run = tq_run(place, q_start);
  if (run.block_start - q_start >= figures.num_rows) return;  // another sequence's first run begins longer before its queries
  const ulong first_row = (ulong(place.block_z) * (HEADS * G) + head) * figures.num_rows;  // of queries and output
  if (place.tid == 0) walk = tq_walk(inputs.figures, head, run.block_start);
  __syncthreads();
  if (place.lane == 0) plain_until[place.warp] = tq_plain_until(walk, inputs.figures, run.warp_start);
  __syncwarp();
  tq_copy_queries(place, inputs.queries + first_row * D, run.block_start - q_start, figures.num_queries, arena);
#pragma unroll
  for (int tile = 0; tile < STAGES - 1; tile++) {
    if (tile < walk.num_tiles) tq_copy_tile(inputs, walk, arena, tile, int(place.tid));
    tq_copies_end();
  }
  TqSums sums;
  tq_start(sums);
  const TqLane at = tq_lane(place);
  const TqAddresses addresses = tq_addresses(place.lane);
  const uchar* lane_queries = arena + (int(place.warp) * WARP_ROWS + addresses.tall_row) * (16 * K_PITCH);
  for (int tile = 0; tile < walk.num_tiles; tile++) {
    tq_copies_wait<STAGES - 2>();
    __syncthreads();  // the tile is there for all, and nobody reads the one that the next copy replaces
    if (tile + STAGES - 1 < walk.num_tiles) tq_copy_tile(inputs, walk, arena, tile + STAGES - 1, int(place.tid));
    tq_copies_end();
    const bool plain = tile >= walk.tokens_from && tile < plain_until[place.warp];
    if (!plain && !tq_sees_tile(walk, inputs.figures, run.warp_start, tile)) continue;
    float s[M_TILES][COLUMNS / 8][4];
    tq_score(lane_queries, tq_key_tile(arena, tile), addresses, s);
    if (CAPPED) tq_cap(s, figures.cap);
    if (!plain) tq_mask(walk, inputs.figures, run.warp_start, tile, at, s);
    uint p[M_TILES][COLUMNS / 8][2];
    tq_weigh(sums, s, figures.scale, p);
    tq_add_values(sums, p, tq_value_tile(arena, tile), addresses, place.lane);
  }
  tq_write(sums, at, run.warp_start - q_start, figures.num_queries, figures.num_rows, figures.scale,
           inputs.sinks[head] * 1.4426950408889634f, out + first_row * DV);
}
