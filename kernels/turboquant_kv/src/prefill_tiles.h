// Tiles of prefill in shared memory: where a row's pieces lie, and how they are copied there.
//
// Rows are CHUNKS pieces of 16 bytes (a multiple of 8). A piece lies at its number XOR the low bits of its row, so that
// the eight rows of an 8x8 matrix, of one piece each, never meet in a bank.
#pragma once
#include "common.h"

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
