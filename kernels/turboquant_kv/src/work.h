// Who works on what in a decode step, and who sees what.
//
// Thread blocks: x = 0 takes the exact rows of sink and window, x >= 1 a run of compressed tokens; y a KV head; z a
// sequence and ROWS of its query rows, which share each unpacked code. A KV head has G * QROWS query rows:
// row = head_in_group * QROWS + query. LIVE of a block's ROWS may exist.
//
// The plan in device memory: TqStepFigures, then TqSequenceFigures for each sequence.
#pragma once
#include "common.h"
#include "figures.h"
#include "turning.h"

TQ_CONSTANT int GROUP_ROWS = G * QROWS;
TQ_CONSTANT int CHUNKS = (GROUP_ROWS + ROWS - 1) / ROWS;
TQ_CONSTANT float LOG2_E = 1.44269504f;

// A block's share: KV head, sequence, ROWS of its query rows from chunk * ROWS on, and of the compressed tokens the
// tiles of 32 from first_tile on; tile_0 is the first that any query sees.
struct TqWork {
  int head, sequence, chunk;
  TqStepFigures step;
  TqSequenceFigures figures;
  int num_tokens, tile_0, num_tiles, first_tile, last_tile;
};

TQ_FN TqSequenceFigures tq_figures_of(const TQ_DEVICE int* plan, int sequence) {
  return tq_sequence_figures(plan + STEP_WORDS + SEQUENCE_WORDS * sequence);
}

// Keys before the first query's window are in no query's: the walk begins at their tile.
TQ_FN int tq_first_seen_tile(TqStepFigures step, TqSequenceFigures figures) {
  const int num_unseen = figures.q_start - SINK + 1 - step.reach;
  return num_unseen > 0 ? num_unseen / 32 : 0;
}

// Parts of a row group: one of exact rows, the others of runs of tiles.
TQ_FN int tq_num_parts(TqStepFigures step, TqSequenceFigures figures) {
  const int num_tiles = (figures.num_pages * PAGE + 31) / 32 - tq_first_seen_tile(step, figures);
  return 1 + (num_tiles > 0 ? (num_tiles + step.tiles_per_block - 1) / step.tiles_per_block : 0);
}

TQ_FN TqWork tq_work(TqPlace place, const TQ_DEVICE int* plan) {
  TqWork work;
  work.head = int(place.block_y);
  work.sequence = int(place.block_z) / CHUNKS;
  work.chunk = int(place.block_z) % CHUNKS;
  work.step = tq_step_figures(plan);
  work.figures = tq_figures_of(plan, work.sequence);
  work.num_tokens = work.figures.num_pages * PAGE;
  work.num_tiles = (work.num_tokens + 31) / 32;
  work.tile_0 = tq_first_seen_tile(work.step, work.figures);
  work.first_tile = work.tile_0 + (int(place.block_x) - 1) * work.step.tiles_per_block;
  const int end = work.first_tile + work.step.tiles_per_block;
  work.last_tile = end < work.num_tiles ? end : work.num_tiles;
  return work;
}

// Not of a block of a shorter sequence than the batch's longest.
TQ_FN bool tq_has_work(TqPlace place, TqWork work) { return place.block_x == 0 || work.first_tile < work.num_tiles; }

// A row of the block: its number in the group, its query, that query's position, and whether there is such a row.
TQ_FN int tq_group_row(TqWork work, int row) { return work.chunk * ROWS + row; }
TQ_FN int tq_query_of(TqWork work, int row) { return tq_group_row(work, row) % QROWS; }
TQ_FN int tq_position_of(TqWork work, int row) { return work.figures.q_start + tq_query_of(work, row); }
TQ_FN bool tq_lives(TqWork work, int row) {
  return tq_group_row(work, row) < GROUP_ROWS && tq_query_of(work, row) < work.figures.num_queries;
}

// Compressed tokens [low, limit) that a row sees: the pages before its own, as far as its window reaches.
TQ_FN int tq_low_of(TqWork work, int row) { return tq_position_of(work, row) - SINK + 1 - work.step.reach; }
TQ_FN int tq_limit_of(TqWork work, int row) {
  const int position = tq_position_of(work, row);
  int page = position < SINK ? 0 : (position - SINK) / PAGE;
  if (page > work.figures.num_pages) page = work.figures.num_pages;
  return tq_lives(work, row) ? page * PAGE : 0;
}

// Exact rows are counted from the sink's first on, the window's behind the sink's.
TQ_FN int tq_num_exact(TqWork work) { return work.figures.num_sink + work.figures.num_window; }

// Whether the query at a position sees exact row `token`. The window's tokens are exact for queries of their own page
// only; others see them through their codes.
TQ_FN bool tq_sees_exact(TqWork work, int query, int token) {
  const bool in_sink = token < work.figures.num_sink;
  const int position = in_sink ? token : work.figures.window_start + token - work.figures.num_sink;
  return token < tq_num_exact(work) && position <= query && position > query - work.step.reach &&
      (in_sink || (query >= SINK && (position - SINK) / PAGE == (query - SINK) / PAGE));
}

// A block's place among the parts of a launch. Memory holds all parts' totals (LIVE, DV), then, from part_stats on, all
// parts' peak and mass of each row.
TQ_FN ulong tq_part_of(TqPlace place) {
  return (ulong(place.block_z) * HEADS + place.block_y) * place.num_blocks_x + place.block_x;
}
TQ_FN ulong tq_stats_of(TqWork work, ulong part) { return ulong(work.step.num_parts) * (LIVE * DV) + part * LIVE * 2; }

// What a decode kernel reads: queries (B, HEADS * G, QROWS, D), strided; page_table (B, table_width); pages
// (P, HEADS, PAGE) of codes and scales; k_constants: what rotates queries, K_ROTATION values, then the keys' means
// (HEADS, D), then what balance.h says; turns: of turning.h.
struct TqDecodeInputs {
  const TQ_DEVICE In* queries;
  long sequence_stride, head_stride, query_stride, dim_stride;
  const TQ_DEVICE int* plan;
  const TQ_DEVICE int* page_table;
  const TQ_DEVICE uchar* k_codes;
  const TQ_DEVICE Half* k_scales;
  const TQ_DEVICE uchar* v_codes;
  const TQ_DEVICE Half* v_scales;
  const TQ_DEVICE float* k_constants;
  const TQ_DEVICE float* turns;
};

// Exact rows of all heads, (HEADS, rows, dims); a row's dims lie side by side.
struct TqRows {
  const TQ_DEVICE Exact* at;
  long head_stride, row_stride;
};
struct TqExactRows {
  TqRows sink_k, sink_v, window_k, window_v;
};
// From the arguments of a kernel.
#define TQ_ROWS(name) {name, name##_strides[0], name##_strides[1]}

// The query vector of a block's row; of a row that is not in the group, the group's first.
TQ_FN const TQ_DEVICE In* tq_query_row(TqDecodeInputs inputs, TqWork work, int row) {
  const int index = tq_group_row(work, row), safe = index < GROUP_ROWS ? index : 0;
  return inputs.queries + (work.sequence * inputs.sequence_stride + (work.head * G + safe / QROWS) * inputs.head_stride +
                           safe % QROWS * inputs.query_stride);
}

// Exact row `token` of a block's head and sequence, counted from the sink's first on, the window's behind the sink's.
TQ_FN const TQ_DEVICE Exact* tq_exact_row(TqRows sink, TqRows window, TqWork work, int token) {
  const TqSequenceFigures figures = work.figures;
  return token < figures.num_sink
      ? sink.at + (work.head * sink.head_stride + (figures.sink_offset + token) * sink.row_stride)
      : window.at + (work.head * window.head_stride + (figures.window_offset + token - figures.num_sink) * window.row_stride);
}
