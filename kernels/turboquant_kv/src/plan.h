// Who works on what. Thread blocks: x = 0 takes the exact rows of sink and window, x >= 1 a run of compressed tokens;
// y a KV head; z a sequence and ROWS of its query rows, which share each unpacked code. A KV head has G * QROWS query
// rows: row = head_in_group * QROWS + query.
//
// plan: [0] tiles of 32 tokens per block, [1] width of the page table, [2] blocks per row group, [3] parts of the whole
// launch, [4] the bits of scale * log2(e), [5] keys that a query sees, itself included (NO_WINDOW: all); from [8] on
// eight figures per sequence: first query's position, queries, pages, sink offset, sink rows, window offset, window's
// position, window rows.
const int GROUP_ROWS = G * QROWS;
const int CHUNKS = (GROUP_ROWS + ROWS - 1) / ROWS;
const int head = int(block_y);
const int sequence = int(block_z) / CHUNKS;
const int chunk = int(block_z) % CHUNKS;
const int about = 8 + 8 * sequence;
const int q_start = plan[about];
const int num_queries = plan[about + 1];
const int num_pages = plan[about + 2];
const int num_tokens = num_pages * PAGE;
const int reach = plan[5];
const float scale = tq_as_float(plan[4]);
// Keys before the first query's window are in no query's: the walk begins at their tile.
const int num_unseen = q_start - SINK + 1 - reach;
const int tile_0 = num_unseen > 0 ? num_unseen / 32 : 0;
const int tiles_per_block = plan[0];
const int first_tile = tile_0 + (int(block_x) - 1) * tiles_per_block;
const int num_tiles = (num_tokens + 31) / 32;
if (block_x > 0 && first_tile >= num_tiles) return;  // a shorter sequence than the batch's longest
const int last_tile = first_tile + tiles_per_block < num_tiles ? first_tile + tiles_per_block : num_tiles;
