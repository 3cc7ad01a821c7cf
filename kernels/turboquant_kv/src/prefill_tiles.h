// Which queries a prefill block has, which columns of the history they see, and in which tiles a block walks over them.
//
// Blocks: x a run of BLOCK_ROWS queries of one head, the last ones first because they see most; y a query head; z a
// sequence. Each warp has WARP_ROWS of them, and a run begins at a multiple of WARP_ROWS behind the sink: a warp's lie in
// one page of 64, and most tiles are seen by all of them or by none. Columns are walked in three sections:
//
//   columns  0 .. num_sink | .. + num_tokens   | .. num_columns
//   hold     sink rows     | pages, decoded    | window, exact
//   seen     <= the query  | page < its own    | page = its own and <= the query
//
// Positions count from the end of the sink here. Figures are read anew where they are needed, which is seldom: registers
// are scarce.
#pragma once
#include "common.h"
#include "figures.h"

constexpr int BLOCK_ROWS = WARPS * WARP_ROWS;
enum TqSection { TQ_SINK, TQ_PAGES, TQ_WINDOW };

// Where a block's and a warp's runs of queries begin.
struct TqRun {
  int block_start, warp_start;
};
TQ_FN TqRun tq_run(TqPlace place, int q_start) {
  const int first = q_start & ~(WARP_ROWS - 1);
  const int block_start = first + (int(place.num_blocks_x) - 1 - int(place.block_x)) * BLOCK_ROWS;
  return {block_start, block_start + int(place.warp) * WARP_ROWS};
}

TQ_FN int tq_page_start(int position) { return position < 0 ? -PAGE : position / PAGE * PAGE; }

// The column of the window in which a position's exact row lies.
TQ_FN int tq_window_column(const int* figures, int position) {
  const TqPrefillFigures at = tq_prefill_figures(figures);
  return at.num_sink + at.num_tokens + position - (at.window_start - SINK);
}

// The columns [low, high) of a section that a query sees; both grow with its position.
TQ_FN int tq_low_of(const int* figures, int section, int position) {
  if (section == TQ_SINK) return 0;
  if (section == TQ_PAGES) return tq_prefill_figures(figures).num_sink;
  return tq_window_column(figures, tq_page_start(position));
}
TQ_FN int tq_high_of(const int* figures, int section, int position) {
  const TqPrefillFigures at = tq_prefill_figures(figures);
  if (section == TQ_SINK) return min(at.num_sink, position + SINK + 1);
  if (section == TQ_PAGES) return at.num_sink + min(at.num_tokens, max(0, tq_page_start(position)));
  return tq_window_column(figures, position) + 1;
}

// Queries of a run that live: [first, last].
TQ_FN int tq_first_of(const int* figures, int start) { return max(start, tq_prefill_figures(figures).q_start - SINK); }
TQ_FN int tq_last_of(const int* figures, int start, int rows) {
  const TqPrefillFigures at = tq_prefill_figures(figures);
  return min(start + rows, at.q_start - SINK + at.num_queries) - 1;
}

// Tiles of COLUMNS columns that the block walks: up to tokens_from in the sink, up to exact_from in pages, then in the
// window. Sections begin at a tile: what one reads of the next is masked. first_row: of the KV head, in all rows.
struct TqWalk {
  int tokens_from, exact_from, num_tiles, token_column, exact_column, num_columns, first_row;
};
TQ_FN TqWalk tq_walk(const int* figures, int head, int block_start) {
  const TqPrefillFigures at = tq_prefill_figures(figures);
  const int first = tq_first_of(figures, block_start), last = tq_last_of(figures, block_start, BLOCK_ROWS);
  const int num_columns = at.num_sink + at.num_tokens + at.num_window;
  const int exact_column = tq_window_column(figures, tq_page_start(max(0, first)));
  TqWalk walk = {0, 0, 0, at.num_sink, exact_column, num_columns, at.first_row + head / G * num_columns};
  if (first <= last) {
    walk.tokens_from = (tq_high_of(figures, TQ_SINK, last) + COLUMNS - 1) / COLUMNS;
    walk.exact_from =
        walk.tokens_from + (tq_high_of(figures, TQ_PAGES, last) - walk.token_column + COLUMNS - 1) / COLUMNS;
    walk.num_tiles = walk.exact_from +
        (last < 0 ? 0 : (tq_high_of(figures, TQ_WINDOW, last) - walk.exact_column + COLUMNS - 1) / COLUMNS);
  }
  return walk;
}

// Up to which tile pages are seen by all rows of a warp, from the sink's end on.
TQ_FN int tq_plain_until(const TqWalk& walk, const int* figures, int warp_start) {
  const int first = tq_first_of(figures, warp_start);
  const bool lives = first <= tq_last_of(figures, warp_start, WARP_ROWS);
  const int seen = tq_high_of(figures, TQ_PAGES, first) - walk.token_column;
  return lives ? walk.tokens_from + seen / COLUMNS : 0;
}

// A tile's first column, and its section.
TQ_FN int tq_column_of(const TqWalk& walk, int tile) {
  if (tile < walk.tokens_from) return tile * COLUMNS;
  return tile < walk.exact_from ? walk.token_column + (tile - walk.tokens_from) * COLUMNS
                                : walk.exact_column + (tile - walk.exact_from) * COLUMNS;
}
TQ_FN int tq_section_of(const TqWalk& walk, int tile) {
  return tile < walk.tokens_from ? TQ_SINK : tile < walk.exact_from ? TQ_PAGES : TQ_WINDOW;
}

// Whether any query of a warp sees anything of a tile.
TQ_FN bool tq_sees_tile(const TqWalk& walk, const int* figures, int warp_start, int tile) {
  const int first = tq_first_of(figures, warp_start), last = tq_last_of(figures, warp_start, WARP_ROWS);
  const int section = tq_section_of(walk, tile), column = tq_column_of(walk, tile);
  return first <= last && column < tq_high_of(figures, section, last) &&
      column + COLUMNS > tq_low_of(figures, section, first);
}

// Rows are CHUNKS pieces of 16 bytes (a multiple of 8). A piece lies at its number XOR the low bits of its row, so that
// the eight rows of an 8x8 matrix, of one piece each, never meet in a bank.
template <int CHUNKS> TQ_FN uint tq_piece(uint row, uint chunk) { return 16 * (row * CHUNKS + (chunk ^ (row & 7))); }

// The same for a lane that reads piece number `chunk` (even, known when compiled), or its neighbour, of many rows with
// the same low bits: from where the first row begins, with bits = 16 * (neighbour ^ low bits). Few addresses are
// computed, all others differ from them by constants.
TQ_FN const uchar* tq_lane_piece(const uchar* row, uint bits, int chunk) {
  return row + (bits ^ (16 * (chunk & 7))) + 128 * (chunk >> 3);
}

// All threads copy a tile's rows, CHUNKS pieces each, to rows of whole multiples of eight pieces. IS_WHOLE: rows up to
// ROWS are there; else row `last` is the last one, and what lies past it becomes copies of it.
template <bool IS_WHOLE, int CHUNKS, int ROWS, int THREADS, typename In>
TQ_FN void tq_copy_rows(uchar* to, const In* from, int last, int tid) {
  const int PITCH = (CHUNKS + 7) / 8 * 8, STEP = THREADS / CHUNKS;
  if (THREADS % CHUNKS != 0) {
#pragma unroll 1
    for (int i = tid; i < ROWS * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, chunk = i % CHUNKS;
      tq_copy<16>(to + tq_piece<PITCH>(row, chunk), from + min(row, last) * (8 * CHUNKS) + 8 * chunk);
    }
    return;
  }
  const int first = tid / CHUNKS, chunk = tid % CHUNKS;  // a thread copies pieces of the same number
  from += 8 * chunk;
  if (IS_WHOLE) {
    from += first * (8 * CHUNKS);
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP) {
      tq_copy<16>(to + tq_piece<PITCH>(first + i, chunk), from + i * (8 * CHUNKS));
    }
  } else {
#pragma unroll 1
    for (int i = first; i < ROWS; i += STEP) {
      tq_copy<16>(to + tq_piece<PITCH>(i, chunk), from + min(i, last) * (8 * CHUNKS));
    }
  }
}
