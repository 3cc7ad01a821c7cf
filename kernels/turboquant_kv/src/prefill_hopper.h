// Prefill on Hopper's tensor cores over a decoded history in tiles (FlashAttention-3, arXiv 2407.08608): one warpgroup
// asks for tiles of 128 columns, the others have 64 queries each. A warpgroup asks for the scores of the next tile and
// for the sums of this one together, and weighs those scores while the sums are added.
//
// Queries, keys and values lie in shared memory as instructions_hopper.h wants tiles; history.h has written the histories
// so, and one copy brings a tile. backends/gpu/arena.py says what lies where.
//
// A row sees columns [0, before) and [from, from + num_own): of sink and pages, and of its own page's exact rows.
#pragma once
#include "fragments_cuda.h"
#include "instructions_hopper.h"
#include "prefill_tiles.h"
#include "softmax.h"

constexpr int GROUP_THREADS = 128, GROUP_ROWS = 64;
constexpr int GROUPS = BLOCK_ROWS / GROUP_ROWS;  // of queries
constexpr int THREADS = GROUP_THREADS * (GROUPS + 1);
constexpr int SUM_TILES = DV / 8, SCORE_TILES = COLUMNS / 8;
constexpr int ROWS_BARRIER = 1;  // the first group's, the others' follow; 0 is __syncthreads'

// queries (sequences, HEADS * G, num_rows, D); keys (rows, D) and values (rows, DV) of all histories in tiles, of each
// sequence HEADS times its columns, up to a whole tile, from its first_row on; figures: TqPrefillFigures of each
// sequence; sinks (HEADS * G,).
struct TqPrefillInputs {
  const In *queries, *keys, *values;
  const int* figures;
  const float* sinks;
};

struct TqSpan {
  int before, from, num_own;
};
TQ_FN TqSpan tq_span(const int* figures, int position) {
  if (position < 0) return {tq_high_of(figures, TQ_SINK, position), 0, 0};
  const int from = tq_low_of(figures, TQ_WINDOW, position);
  return {tq_high_of(figures, TQ_PAGES, position), from, tq_high_of(figures, TQ_WINDOW, position) - from};
}

// Tiles that a block walks: those before pages_end, then from window_from on.
struct TqTiles {
  int pages_end, window_from, num_tiles;
};
TQ_FN TqTiles tq_tiles(const int* figures, int first, int last) {
  const TqSpan low = tq_span(figures, max(first, 0)), high = tq_span(figures, last);
  const int pages_end = (high.before + COLUMNS - 1) / COLUMNS, window_from = max(pages_end, low.from / COLUMNS);
  const int window_end = (high.from + high.num_own + COLUMNS - 1) / COLUMNS;
  return {pages_end, window_from, pages_end + (last < 0 ? 0 : max(0, window_end - window_from))};
}
TQ_FN int tq_tile_of(TqTiles tiles, int i) { return i < tiles.pages_end ? i : i - tiles.pages_end + tiles.window_from; }

// Dynamic shared memory from where tiles may begin: their swizzle counts from multiples of 1024 bytes.
TQ_FN uchar* tq_tile_arena() {
  uchar* arena = tq_arena();
  return arena + (-tq_shared_address(arena) & 1023);
}

// What lies in shared memory behind the tiles: spans of all rows, barriers.
struct TqBarriers {
  ulong keys_full[STAGES], keys_empty[STAGES], values_full[STAGES], values_empty[STAGES];
};
TQ_FN TqSpan* tq_spans(uchar* arena) { return reinterpret_cast<TqSpan*>(arena + SPANS_AT); }
TQ_FN TqBarriers* tq_barriers(uchar* arena) { return reinterpret_cast<TqBarriers*>(arena + BARRIERS_AT); }
TQ_FN void tq_open(TqBarriers* barriers) {
  for (int i = 0; i < STAGES; i++) {
    tq_barrier_open_for(&barriers->keys_full[i], 1);
    tq_barrier_open_for(&barriers->values_full[i], 1);
    tq_barrier_open_for(&barriers->keys_empty[i], 4 * GROUPS);
    tq_barrier_open_for(&barriers->values_empty[i], 4 * GROUPS);
  }
}

// Copies one side's tiles, each as soon as its place is free. One thread.
TQ_FN void tq_bring(const In* from, TqTiles tiles, int tile_bytes, uchar* to, ulong* full, ulong* empty) {
  for (int i = 0; i < tiles.num_tiles; i++) {
    const int slot = i % STAGES;
    if (i >= STAGES) tq_barrier_wait(empty + slot, (i / STAGES - 1) & 1);
    tq_barrier_expect(full + slot, tile_bytes);
    tq_bulk_copy(to + slot * tile_bytes, reinterpret_cast<const uchar*>(from) + ulong(tq_tile_of(tiles, i)) * tile_bytes,
                 tile_bytes, full + slot);
  }
}

// A warpgroup's queries, zeros past the last. to: blocks of 64 dims of the whole block's rows.
TQ_FN void tq_bring_queries(const In* queries, int first, int num_queries, int row_of_block, int tid, uchar* to) {
#pragma unroll
  for (int i = tid; i < GROUP_ROWS * (D / 8); i += GROUP_THREADS) {
    const int row = i / (D / 8), chunk = i % (D / 8), query = first + row, at = row_of_block + row;
    const uint4 piece = query < num_queries ? *reinterpret_cast<const uint4*>(queries + ulong(query) * D + 8 * chunk)
                                            : make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(to + (chunk / 8 * BLOCK_ROWS + at) * 128 + 16 * ((chunk & 7) ^ (at & 7))) = piece;
  }
}

// A lane's rows r and r + 8 of its warp's 16, dims 8 j + 2 c and the next. Peaks are scores before the scale, known to all
// lanes of a row; masses are the lane's share; fades are what sums up to here are still to be multiplied with.
struct TqSums {
  float o[SUM_TILES][4], peak[2], mass[2], fade[2];
};
TQ_FN void tq_start(TqSums& sums) {
#pragma unroll
  for (int j = 0; j < SUM_TILES; j++) sums.o[j][0] = sums.o[j][1] = sums.o[j][2] = sums.o[j][3] = 0.0f;
  sums.peak[0] = sums.peak[1] = TQ_NO_PEAK;
  sums.mass[0] = sums.mass[1] = 0.0f;
  sums.fade[0] = sums.fade[1] = 1.0f;
}

// Asks for scores; queries: of the warpgroup.
TQ_FN void tq_ask_scores(float (&s)[SCORE_TILES][4], uint queries, uint keys) {
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    tq_score_product<In>(s, tq_tile_by_rows(queries) + ((i / 4 * BLOCK_ROWS * 128 + i % 4 * 32) >> 4),
                         tq_tile_by_rows(keys) + ((i / 4 * COLUMNS * 128 + i % 4 * 32) >> 4), i > 0);
  }
  tq_products_end();
}

// Asks for a tile's values with weights p to be added.
TQ_FN void tq_ask_sums(TqSums& sums, const uint (&p)[SCORE_TILES][2], uint values) {
#pragma unroll
  for (int i = 0; i < COLUMNS / 16; i++) {
    tq_value_product<In>(sums.o, p[2 * i][0], p[2 * i][1], p[2 * i + 1][0], p[2 * i + 1][1],
                         tq_tile_by_dims(values, COLUMNS * 128) + ((i * 16 * 128) >> 4));
  }
  tq_products_end();
}

// Masks what rows do not see of a tile. spans: of the lane's first row; column: the lane's first.
TQ_FN void tq_mask(const TqSpan* spans, int column, float (&s)[SCORE_TILES][4]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const TqSpan span = spans[8 * h];
    const int before = span.before - column, from = span.from - column;
    const uint num_own = span.num_own;
#pragma unroll
    for (int j = 0; j < SCORE_TILES; j++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (8 * j + i >= before && uint(8 * j + i - from) >= num_own) s[j][2 * h + i] = TQ_MASKED;
      }
    }
  }
}

// Scores to weights, in place.
TQ_FN void tq_weigh(TqSums& sums, float (&s)[SCORE_TILES][4], float scale) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float next = sums.peak[h];
#pragma unroll
    for (int j = 0; j < SCORE_TILES; j++) next = fmaxf(next, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
    next = fmaxf(next, __shfl_xor_sync(~0u, next, 1));
    next = fmaxf(next, __shfl_xor_sync(~0u, next, 2));
    const float offset = next * scale;
    sums.fade[h] = tq_exp2((sums.peak[h] - next) * scale);
    sums.peak[h] = next;
    sums.mass[h] *= sums.fade[h];
#pragma unroll
    for (int j = 0; j < SCORE_TILES; j++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        s[j][2 * h + i] = tq_exp2(s[j][2 * h + i] * scale - offset);
        sums.mass[h] += s[j][2 * h + i];
      }
    }
  }
}
TQ_FN void tq_pack(const float (&s)[SCORE_TILES][4], uint (&p)[SCORE_TILES][2]) {
#pragma unroll
  for (int j = 0; j < SCORE_TILES; j++) {
    p[j][0] = tq_pair_as<In>(s[j][0], s[j][1]);
    p[j][1] = tq_pair_as<In>(s[j][2], s[j][3]);
  }
}
// Most tiles raise no peak.
TQ_FN void tq_fade(TqSums& sums) {
  if (!__any_sync(~0u, sums.fade[0] != 1.0f || sums.fade[1] != 1.0f)) return;
#pragma unroll
  for (int j = 0; j < SUM_TILES; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) sums.o[j][i] *= sums.fade[i / 2];
  }
}

// Sums to outputs: the attention sink joins the mass, rows past the queries are zeros. out: of the head, (num_rows, DV).
// first: the query of the lane's first row; sink: its head's logit.
TQ_FN void tq_write(const TqSums& sums, int c, int first, TqPrefillFigures figures, float sink, In* out) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float total = sums.mass[h];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const float mine = sums.peak[h] * figures.scale, top = fmaxf(mine, sink), share = tq_exp2(mine - top);
    const float factor = share / (total * share + tq_exp2(sink - top));
    const int query = first + 8 * h;
    if (query >= figures.num_rows) continue;
    In* to = out + ulong(query) * DV + 2 * c;
#pragma unroll
    for (int j = 0; j < SUM_TILES; j++) {
      const float x = sums.o[j][2 * h] * factor, y = sums.o[j][2 * h + 1] * factor;
      *reinterpret_cast<uint*>(to + 8 * j) = query < figures.num_queries ? tq_pair_as<In>(x, y) : 0u;
    }
  }
}

TQ_FN void tq_release(ulong* empty, int lane) {
  if (lane == 0) tq_barrier_arrive(empty);
}

// Scores of the tile that begins at a column to weights; they have arrived.
TQ_FN void tq_weigh_tile(TqSums& sums, float (&s)[SCORE_TILES][4], TqPrefillFigures figures, const TqSpan* spans, int column,
                         int plain_until, int c) {
  if (CAPPED) {
#pragma unroll
    for (int j = 0; j < SCORE_TILES; j++) {
#pragma unroll
      for (int i = 0; i < 4; i++) s[j][i] = tq_capped(s[j][i], figures.cap);
    }
  }
  if (column + COLUMNS > plain_until) tq_mask(spans, column + 2 * c, s);
  tq_weigh(sums, s, figures.scale);
}

// A warpgroup's walk. plain_until: columns that all of its rows see.
TQ_FN void tq_walk_tiles(TqSums& sums, uchar* arena, TqTiles tiles, TqPrefillFigures figures, const TqSpan* spans,
                         int plain_until, int group, int lane) {
  TqBarriers* barriers = tq_barriers(arena);
  const uint queries = tq_shared_address(arena) + group * GROUP_ROWS * 128;
  const uint keys = tq_shared_address(arena + KEYS_AT), values = tq_shared_address(arena + VALUES_AT);
  float s[SCORE_TILES][4];
  uint p[SCORE_TILES][2];
  tq_barrier_wait(&barriers->keys_full[0], 0);
  tq_products_begin();
  tq_ask_scores(s, queries, keys);
  tq_products_wait<0>(s);
  tq_release(&barriers->keys_empty[0], lane);
  tq_weigh_tile(sums, s, figures, spans, tq_tile_of(tiles, 0) * COLUMNS, plain_until, lane & 3);
  tq_pack(s, p);
  int slot = 0, phase = 0;  // of the tile whose sums are still to come
#pragma unroll 1
  for (int i = 1; i < tiles.num_tiles; i++) {
    const int next_slot = slot + 1 == STAGES ? 0 : slot + 1, next_phase = next_slot == 0 ? phase ^ 1 : phase;
    tq_barrier_wait(&barriers->keys_full[next_slot], next_phase);
    tq_products_begin();
    tq_ask_scores(s, queries, keys + next_slot * K_TILE_BYTES);
    tq_barrier_wait(&barriers->values_full[slot], phase);
    tq_products_begin();
    tq_ask_sums(sums, p, values + slot * V_TILE_BYTES);
    tq_products_wait<1>(s);
    tq_release(&barriers->keys_empty[next_slot], lane);
    tq_weigh_tile(sums, s, figures, spans, tq_tile_of(tiles, i) * COLUMNS, plain_until, lane & 3);
    tq_products_wait<0>(sums.o);
    tq_release(&barriers->values_empty[slot], lane);
    tq_pack(s, p);
    tq_fade(sums);
    slot = next_slot;
    phase = next_phase;
  }
  tq_barrier_wait(&barriers->values_full[slot], phase);
  tq_products_begin();
  tq_ask_sums(sums, p, values + slot * V_TILE_BYTES);
  tq_products_wait<0>(sums.o);
}

// Zeros where no row of the block has a query.
TQ_FN void tq_write_zeros(TqPlace place, int first, int num_rows, In* out) {
  const int end = min(first + BLOCK_ROWS, num_rows) * (DV / 8);
  for (int i = first * (DV / 8) + int(place.tid); i < end; i += THREADS) {
    reinterpret_cast<uint4*>(out)[i] = make_uint4(0, 0, 0, 0);
  }
}

// out (sequences, HEADS * G, num_rows, DV).
TQ_FN void tq_prefill_hopper(TqPlace place, TqPrefillInputs inputs, In* out) {
  uchar* arena = tq_tile_arena();
  inputs.figures += place.block_z * PREFILL_WORDS;
  const TqPrefillFigures figures = tq_prefill_figures(inputs.figures);
  const int head = int(place.block_y), first = (int(place.num_blocks_x) - 1 - int(place.block_x)) * BLOCK_ROWS;
  const int q_start = figures.q_start - SINK, num_rows = figures.num_rows;
  const ulong first_row = (ulong(place.block_z) * (HEADS * G) + head) * num_rows;  // of queries and output
  out += first_row * DV;
  if (first >= figures.num_queries) return tq_write_zeros(place, first, num_rows, out);
  const int last = min(first + BLOCK_ROWS, figures.num_queries) - 1;
  const TqTiles tiles = tq_tiles(inputs.figures, q_start + first, q_start + last);
  if (int(place.tid) < BLOCK_ROWS) tq_spans(arena)[place.tid] = tq_span(inputs.figures, q_start + first + int(place.tid));
  if (place.tid == 0) tq_open(tq_barriers(arena));
  tq_barriers_opened();
  __syncthreads();
  const int group = int(tq_shuffle(place.warp, 0)) / 4;
  if (group == GROUPS) {
    tq_registers_down<GROUPS == 2 ? 24 : 32>();
    const int num_columns = figures.num_sink + figures.num_tokens + figures.num_window;
    const ulong row = figures.first_row + head / G * ((num_columns + COLUMNS - 1) / COLUMNS * COLUMNS);
    TqBarriers* barriers = tq_barriers(arena);
    if (place.tid == GROUPS * GROUP_THREADS) {
      tq_bring(inputs.keys + row * D, tiles, K_TILE_BYTES, arena + KEYS_AT, barriers->keys_full, barriers->keys_empty);
    } else if (place.tid == GROUPS * GROUP_THREADS + 32) {
      tq_bring(inputs.values + row * DV, tiles, V_TILE_BYTES, arena + VALUES_AT, barriers->values_full,
               barriers->values_empty);
    }
  } else {
    tq_registers_up<GROUPS == 2 ? 240 : 160>();
    const int tid = int(place.tid) - group * GROUP_THREADS, row = group * GROUP_ROWS;
    tq_bring_queries(inputs.queries + first_row * D, first + row, figures.num_queries, row, tid, arena);
    tq_shared_written();
    tq_meet<GROUP_THREADS>(ROWS_BARRIER + group);
    const TqLane at = tq_lane(place);
    const int lane_row = row + tid / 32 * 16 + at.r;
    TqSums sums;
    tq_start(sums);
    tq_walk_tiles(sums, arena, tiles, figures, tq_spans(arena) + lane_row, tq_spans(arena)[row].before, group,
                  int(place.lane));
    tq_write(sums, at.c, first + lane_row, figures, inputs.sinks[head] * 1.4426950408889634f, out);
  }
}
