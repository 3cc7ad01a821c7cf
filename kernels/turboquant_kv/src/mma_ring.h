// Each warp copies its own tiles to its own ring, STAGES - 1 ahead, and waits for nobody else. A tile's page is looked up
// one tile before it is copied, so that nothing waits for two reads in a row. TQ_BULK: Hopper's copy engine moves a tile
// in seven pieces, one lane a piece, and a barrier in shared memory counts their bytes; else each lane copies 16 bytes at a
// time.
const int begin = first_tile * 32 + int(warp) * TILE, end = last_tile * 32 < num_tokens ? last_tile * 32 : num_tokens;
const int STEP = WARPS * TILE;
const int* pages = page_table + sequence * plan[1];
uchar* ring = arena + TABLE_BYTES + 16 * Q_PITCH + int(warp) * RING_BYTES;
int t_copied = begin, stage_copied = 0;
int page_id = begin < end ? pages[begin / PAGE] : 0;
#if TQ_BULK
// Lane 0: keys; 1 to 4: the blocks of values; 5 and 6: scales.
const uchar* piece_from = k_codes;
uint piece_of_row = K_BYTES, piece_bytes = K_TILE, piece_at = 0, piece_shift = 0;
if (lane > 0) {
  piece_from = v_codes;
  piece_of_row = V_BYTES;
  piece_bytes = BLOCK_TOKENS * V_BYTES;
  piece_shift = (lane - 1) * piece_bytes;
  piece_at = K_TILE + (lane - 1) * V_BLOCK;
}
if (lane > 4) {
  piece_from = reinterpret_cast<const uchar*>(lane == 5 ? k_scales : v_scales);
  piece_of_row = 2;
  piece_bytes = 2 * TILE;
  piece_shift = 0;
  piece_at = SCALES_AT + (lane - 5) * 2 * TILE;
}
piece_from += piece_shift;
#endif
auto copy_tile = [&]() {
  if (t_copied < end) {
    uchar* to = ring + stage_copied * STAGE_BYTES;
    const uint row_id = uint(page_id * HEADS + head) * PAGE + t_copied % PAGE;
    page_id = pages[min(t_copied + STEP, end - TILE) / PAGE];
#if TQ_BULK
    if (lane == 0) tq_barrier_expect(barrier + stage_copied, TILE * (K_BYTES + V_BYTES + 4));
    if (lane < 7) tq_bulk_copy(to + piece_at, piece_from + ulong(row_id) * piece_of_row, piece_bytes, barrier + stage_copied);
#else
    const uchar* k_from = k_codes + ulong(row_id) * K_BYTES;
    const uchar* v_from = v_codes + ulong(row_id) * V_BYTES;
#pragma unroll
    for (int i = 0; i < (K_TILE + 511) / 512; i++) {
      const int at = (i * 32 + int(lane)) * 16;
      if (K_TILE % 512 == 0 || at < K_TILE) tq_copy<16>(to + at, k_from + at);
    }
#pragma unroll
    for (int i = 0; i < (TILE * V_BYTES + 511) / 512; i++) {
      const int at = (i * 32 + int(lane)) * 16;
      if (TILE * V_BYTES % 512 == 0 || at < TILE * V_BYTES) {
        tq_copy<16>(to + K_TILE + at + at / (BLOCK_TOKENS * V_BYTES) * V_GAP, v_from + at);
      }
    }
    if (lane < TILE / 4) {
      const int at = int(lane) % (TILE / 8) * 8;
      tq_copy<16>(to + SCALES_AT + 16 * lane, (lane < TILE / 8 ? k_scales : v_scales) + row_id + at);
    }
#endif
  }
#if !TQ_BULK
  tq_copies_end();
#endif
  t_copied += STEP;
  stage_copied = stage_copied + 1 == STAGES ? 0 : stage_copied + 1;
};
