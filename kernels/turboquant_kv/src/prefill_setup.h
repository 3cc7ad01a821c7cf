// Prefill on tensor cores: which queries a block has and which columns they see (FlashAttention-2, arXiv 2307.08691).
//
// Blocks: x a run of ROWS queries of one head, the last ones first because they see most; y a query head. Each warp has
// WARP_ROWS of them, and a run begins at a multiple of WARP_ROWS behind the sink: a warp's lie in one page of 64, and
// most tiles are seen by all of them or by none. Columns are walked in three sections:
//
//   columns  0 .. num_sink | .. + num_tokens   | .. num_columns
//   hold     sink rows     | pages, decoded    | window, exact
//   seen     <= the query  | page < its own    | page = its own and <= the query
//
// What figures hold: the first query's position, queries, rows of the output, sink rows, decoded tokens, the window's
// position and rows, and the bits of scale * log2(e).
const int Q_START = 0, QUERIES = 1, OUT_ROWS = 2, SINK_ROWS = 3, TOKENS = 4;
const int WINDOW_START = 5, WINDOW_ROWS = 6, SCALE = 7;
const int M_TILES = WARP_ROWS / 16;
const int THREADS = 32 * WARPS;
const int ROWS = WARPS * WARP_ROWS;
const int K_CHUNKS = D / 8, V_CHUNKS = DV / 8;  // pieces of a row in memory; in the arena a multiple of eight
const int K_PITCH = (K_CHUNKS + 7) / 8 * 8, V_PITCH = (V_CHUNKS + 7) / 8 * 8;
const int Q_BYTES = ROWS * K_PITCH * 16, K_BYTES = COLUMNS * K_PITCH * 16, V_BYTES = COLUMNS * V_PITCH * 16;
extern __shared__ __align__(128) uchar arena[];  // queries, then STAGES tiles of keys, then as many of values

const int r = int(lane) >> 2, c = int(lane) & 3;
const int head = int(block_y);
const int num_queries = figures[QUERIES], num_rows = figures[OUT_ROWS];
const float scale = tq_as_float(figures[SCALE]);

// Positions from here on count from the end of the sink.
const int q_start = figures[Q_START] - SINK;
const int block_start = (q_start & ~(WARP_ROWS - 1)) + (int(num_blocks_x) - 1 - int(block_x)) * ROWS;
const int warp_start = block_start + int(warp) * WARP_ROWS;
const auto page_start = [&](int position) { return position < 0 ? -PAGE : position / PAGE * PAGE; };

// The columns [low, high) of a section that a query sees; both grow with its position. Figures are read anew where they
// are needed, which is seldom: registers are scarce.
const auto exact_column = [&](int position) {
  return figures[SINK_ROWS] + figures[TOKENS] + position - (figures[WINDOW_START] - SINK);
};
const auto low_of = [&](int section, int position) {
  return section == 0 ? 0 : section == 1 ? figures[SINK_ROWS] : exact_column(page_start(position));
};
const auto high_of = [&](int section, int position) {
  if (section == 0) return min(figures[SINK_ROWS], position + SINK + 1);
  if (section == 1) return figures[SINK_ROWS] + min(figures[TOKENS], max(0, page_start(position)));
  return exact_column(position) + 1;
};

// Queries of a run that live: [first, last].
const auto first_of = [&](int start) { return max(start, figures[Q_START] - SINK); };
const auto last_of = [&](int start, int rows) {
  return min(start + rows, figures[Q_START] - SINK + figures[QUERIES]) - 1;
};

// Tiles of COLUMNS columns that the block walks, in shared memory because registers are scarce: up to tokens_from in
// the sink, up to exact_from in pages, then in the window. Sections begin at a tile: what one reads of the next is
// masked.
struct Walk {
  int tokens_from, exact_from, num_tiles, token_column, exact_column, num_columns, first_row;
};
__shared__ Walk walk;
__shared__ int plain_until[WARPS];  // up to there pages' tiles are seen by all rows of a warp
if (tid == 0) {
  const int first = first_of(block_start), last = last_of(block_start, ROWS);
  const int num_columns = figures[SINK_ROWS] + figures[TOKENS] + figures[WINDOW_ROWS];
  walk = {0, 0, 0, figures[SINK_ROWS], exact_column(page_start(max(0, first))), num_columns, head / G * num_columns};
  if (first <= last) {
    walk.tokens_from = (high_of(0, last) + COLUMNS - 1) / COLUMNS;
    walk.exact_from = walk.tokens_from + (high_of(1, last) - walk.token_column + COLUMNS - 1) / COLUMNS;
    walk.num_tiles =
        walk.exact_from + (last < 0 ? 0 : (high_of(2, last) - walk.exact_column + COLUMNS - 1) / COLUMNS);
  }
}
__syncthreads();
if (lane == 0) {
  const bool lives = first_of(warp_start) <= last_of(warp_start, WARP_ROWS);
  const int seen = high_of(1, first_of(warp_start)) - walk.token_column;
  plain_until[warp] = lives ? walk.tokens_from + seen / COLUMNS : 0;
}
__syncwarp();
const auto column_of = [&](int tile) {
  if (tile < walk.tokens_from) return tile * COLUMNS;
  return tile < walk.exact_from ? walk.token_column + (tile - walk.tokens_from) * COLUMNS
                                : walk.exact_column + (tile - walk.exact_from) * COLUMNS;
};
const auto section_of = [&](int tile) { return tile < walk.tokens_from ? 0 : tile < walk.exact_from ? 1 : 2; };
