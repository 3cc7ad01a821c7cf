// Who works on what, and the block's query rows in shared memory. Thread blocks: x = 0 takes the exact rows of sink and
// window, x >= 1 a run of compressed tokens; y a KV head; z a sequence and ROWS of its query rows, which share each
// unpacked code. A KV head has G * QROWS query rows: row = head_in_group * QROWS + query.
//
// meta: [0] tiles of 32 tokens per block, [1] width of the page table; from [8] on eight figures per sequence:
// first query's position, queries, pages, sink offset, sink rows, window offset, window's position, window rows.
const int THREADS = 128;
const int WARPS = THREADS / 32;
const int GROUP_ROWS = G * QROWS;
const int CHUNKS = (GROUP_ROWS + ROWS - 1) / ROWS;
const int head = int(block_y);
const int sequence = int(block_z) / CHUNKS;
const int chunk = int(block_z) % CHUNKS;
const int about = 8 + 8 * sequence;
const int q_start = meta[about];
const int num_queries = meta[about + 1];
const int num_pages = meta[about + 2];
const int num_tokens = num_pages * PAGE;
const int tiles_per_block = meta[0];
const int first_tile = (int(block_x) - 1) * tiles_per_block;
const int num_tiles = (num_tokens + 31) / 32;
if (block_x > 0 && first_tile >= num_tiles) return;  // a shorter sequence than the batch's longest
const int last_tile = first_tile + tiles_per_block < num_tiles ? first_tile + tiles_per_block : num_tiles;

// Phase 1: queries as base-2 logits. Rows beyond the group, or beyond a sequence's queries, are zero and see nothing.
for (int i = int(tid); i < ROWS * D; i += THREADS) {
  const int row = chunk * ROWS + i / D;
  const int query = row % QROWS;
  float x = 0.0f;
  if (row < GROUP_ROWS && query < num_queries) {
    x = float(queries[sequence * queries_strides[0] + (head * G + row / QROWS) * queries_strides[1] +
                      query * queries_strides[2] + (i % D) * queries_strides[3]]) * params[0];
  }
  shared_q[i] = x;
}
TQ_BARRIER();

// Phase 2, compressed tokens only: q . mean_k, then the queries into the rotated basis.
if (block_x > 0) {
  for (int r = int(warp); r < ROWS; r += WARPS) {
    float dot = 0.0f;
    for (int d = int(lane); d < D; d += 32) dot += shared_q[r * D + d] * k_mean[head * D + d];
    dot = tq_lane_sum(dot);
    if (lane == 0) row_mean[r] = dot;
  }
  TQ_BARRIER();
  if ((D & (D - 1)) == 0) {
    // The rotation's first row is sign / sqrt(D): a Sylvester matrix begins with ones.
    for (int i = int(tid); i < LIVE * D; i += THREADS) shared_q[i] *= k_rotation[i % D];
    tq_hadamard(shared_q, LIVE, D, tid, THREADS);  // rows that do not exist are zero and stay so
  } else {
    for (int i = int(tid); i < D; i += THREADS) {
      float sum[ROWS];
      for (int r = 0; r < ROWS; r++) sum[r] = 0.0f;
      for (int d = 0; d < D; d++) {
        const float c = k_rotation[D * D + d * D + i];  // the transposed copy, so that threads read neighbours
        for (int r = 0; r < ROWS; r++) sum[r] += shared_q[r * D + d] * c;
      }
      for (int r = 0; r < ROWS; r++) work[r * D + i] = sum[r];
    }
    TQ_BARRIER();
    for (int i = int(tid); i < ROWS * D; i += THREADS) shared_q[i] = work[i];
    TQ_BARRIER();
  }
}

// Compressed tokens that a query row may see: the pages before its own.
int limits[LIVE];
for (int r = 0; r < LIVE; r++) {
  const int row = chunk * ROWS + r;
  const int position = q_start + row % QROWS;
  int page = position < SINK ? 0 : (position - SINK) / PAGE;
  if (page > num_pages) page = num_pages;
  limits[r] = (row < GROUP_ROWS && row % QROWS < num_queries) ? page * PAGE : 0;
}

// The running softmax: every lane knows its rows' peaks; masses are sums over lanes; a lane owns dims 2*lane + 64*i.
const int PAIRS = (DV + 63) / 64;
float peak[LIVE], mass[LIVE], total[LIVE][PAIRS * 2];
for (int r = 0; r < LIVE; r++) {
  peak[r] = TQ_NO_PEAK;
  mass[r] = 0.0f;
  for (int i = 0; i < PAIRS * 2; i++) total[r][i] = 0.0f;
}
