// A warp's ring of code tiles in shared memory: it copies its own tiles, STAGES - 1 ahead, and waits for nobody else.
//
// A tile: keys, values in four blocks of tokens, one for each lane column c and V_BLOCK_BYTES apart, so that the four
// rows that are read at once lie in different banks; key scales, value scales:
//
//   0            V_AT                                              SCALES_AT
//   | TILE keys  | TILE/4 values, gap | ... | ... | TILE/4 values, gap | k scales | v scales |
//
// BULK: Hopper's copy engine moves a tile in seven pieces, one lane a piece, and a barrier in shared memory counts their
// bytes; else each lane copies 16 bytes at a time.
#pragma once
#include "mma_block.h"

constexpr int RING_BYTES = STAGES * STAGE_BYTES;
constexpr int RING_STEP = WARPS * TILE;  // tokens from one tile of a warp to its next

struct TqRing {
  uchar* tiles;
  ulong* barriers;   // one a tile
  const int* pages;  // of the sequence
  int begin, end;    // the warp's first token, and where the block's end
  int t_copied, stage_copied, page_id;  // the next tile to copy; its page is looked up one tile before, so that nothing
                                        // waits for two reads in a row
  int stage, phase;                     // the next tile to read
  const uchar* piece_from;              // the lane's piece: of the first storage row; BULK only
  uint piece_of_row, piece_bytes, piece_at;
};

// A barrier for each tile of a warp's ring, opened before anything is waited for.
TQ_FN void tq_open_barriers(ulong* barriers, uint lane) {
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < STAGES; i++) tq_barrier_open(barriers + i);
    tq_barriers_opened();
  }
  __syncwarp();
}

// Lane 0: keys; 1 to 4: the blocks of values; 5 and 6: scales.
TQ_FN void tq_choose_piece(TqRing& ring, TqDecodeInputs inputs, uint lane) {
  uint shift = 0;
  ring.piece_from = inputs.k_codes;
  ring.piece_of_row = K_BYTES;
  ring.piece_bytes = TILE * K_BYTES;
  ring.piece_at = 0;
  if (lane > 0) {
    ring.piece_from = inputs.v_codes;
    ring.piece_of_row = V_BYTES;
    ring.piece_bytes = BLOCK_TOKENS * V_BYTES;
    shift = (lane - 1) * ring.piece_bytes;
    ring.piece_at = V_AT + (lane - 1) * V_BLOCK_BYTES;
  }
  if (lane > 4) {
    ring.piece_from = reinterpret_cast<const uchar*>(lane == 5 ? inputs.k_scales : inputs.v_scales);
    ring.piece_of_row = 2;
    ring.piece_bytes = 2 * TILE;
    shift = 0;
    ring.piece_at = SCALES_AT + (lane - 5) * 2 * TILE;
  }
  ring.piece_from += shift;
}

TQ_FN TqRing tq_ring(TqPlace place, TqDecodeInputs inputs, TqWork work, uchar* arena, ulong* barriers) {
  TqRing ring;
  ring.tiles = arena + RINGS_AT + int(place.warp) * RING_BYTES;
  ring.barriers = barriers;
  ring.pages = inputs.page_table + work.sequence * work.step.table_width;
  ring.begin = work.first_tile * 32 + int(place.warp) * TILE;
  ring.end = work.last_tile * 32 < work.num_tokens ? work.last_tile * 32 : work.num_tokens;
  ring.t_copied = ring.begin;
  ring.stage_copied = ring.stage = ring.phase = 0;
  ring.page_id = ring.begin < ring.end ? ring.pages[ring.begin / PAGE] : 0;
  if (BULK) tq_choose_piece(ring, inputs, place.lane);
  return ring;
}

TQ_FN void tq_copy_by_engine(TqRing& ring, uchar* to, uint row_id, uint lane) {
  ulong* barrier = ring.barriers + ring.stage_copied;
  if (lane == 0) tq_barrier_expect(barrier, TILE * (K_BYTES + V_BYTES + 4));
  if (lane < 7) {
    tq_bulk_copy(to + ring.piece_at, ring.piece_from + ulong(row_id) * ring.piece_of_row, ring.piece_bytes, barrier);
  }
}

TQ_FN void tq_copy_by_lanes(uchar* to, TqDecodeInputs inputs, uint row_id, uint lane) {
  const uchar* k_from = inputs.k_codes + ulong(row_id) * K_BYTES;
  const uchar* v_from = inputs.v_codes + ulong(row_id) * V_BYTES;
  const int K_TILE = TILE * K_BYTES, V_TILE = TILE * V_BYTES, V_BLOCK = BLOCK_TOKENS * V_BYTES;
#pragma unroll
  for (int i = 0; i < (K_TILE + 511) / 512; i++) {
    const int at = (i * 32 + int(lane)) * 16;
    if (K_TILE % 512 == 0 || at < K_TILE) tq_copy<16>(to + at, k_from + at);
  }
#pragma unroll
  for (int i = 0; i < (V_TILE + 511) / 512; i++) {
    const int at = (i * 32 + int(lane)) * 16;
    if (V_TILE % 512 == 0 || at < V_TILE) tq_copy<16>(to + V_AT + at + at / V_BLOCK * (V_BLOCK_BYTES - V_BLOCK), v_from + at);
  }
  if (lane < TILE / 4) {
    const int at = int(lane) % (TILE / 8) * 8;
    tq_copy<16>(to + SCALES_AT + 16 * lane, (lane < TILE / 8 ? inputs.k_scales : inputs.v_scales) + row_id + at);
  }
}

// Asks for the next tile, if there is one.
TQ_FN void tq_copy_tile(TqRing& ring, TqDecodeInputs inputs, int head, uint lane) {
  if (ring.t_copied < ring.end) {
    uchar* to = ring.tiles + ring.stage_copied * STAGE_BYTES;
    const uint row_id = uint(ring.page_id * HEADS + head) * PAGE + ring.t_copied % PAGE;
    ring.page_id = ring.pages[min(ring.t_copied + RING_STEP, ring.end - TILE) / PAGE];
    if (BULK) tq_copy_by_engine(ring, to, row_id, lane);
    else tq_copy_by_lanes(to, inputs, row_id, lane);
  }
  if (!BULK) tq_copies_end();
  ring.t_copied += RING_STEP;
  ring.stage_copied = ring.stage_copied + 1 == STAGES ? 0 : ring.stage_copied + 1;
}

// STAGES - 1 tiles ahead of the first that is read.
TQ_FN void tq_copy_first_tiles(TqRing& ring, TqDecodeInputs inputs, int head, uint lane) {
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) tq_copy_tile(ring, inputs, head, lane);
}

// Waits for the next tile to read.
TQ_FN const uchar* tq_next_tile(TqRing& ring) {
  if (BULK) tq_barrier_wait(ring.barriers + ring.stage, ring.phase);
  else tq_copies_wait<STAGES - 2>();
  __syncwarp();
  const uchar* tile = ring.tiles + ring.stage * STAGE_BYTES;
  if (++ring.stage == STAGES) {
    ring.stage = 0;
    ring.phase ^= 1;
  }
  return tile;
}
