// Trellis codes to bytes that index a table of half pairs (mma_tables.h), for tensor cores.
//
// Two tokens share every word: a coordinate's field of two bits has the first token's bit and the second's, so that the
// XORs that decode a trellis (trellis.h) are done for both at once, and so is what crosses from a lane's part of a vector
// to the next lane's. Bytes of keys are two levels of one token, of coordinates 4q and 4q + 2 or 4q + 1 and 4q + 3;
// bytes of values are the bits of one coordinate of both tokens, as they come:
//
//   bit      0     1     2     3     4 ...
//   keys     level of the one  |     level of the other      (2 bits: three of each four count)
//   values   b[i-1]      high        own bits (2 bits: two, and two that do not count)
#pragma once
#include "mma_tables.h"
#include "trellis.h"

// Packed blocks of 16 that a part of `num` coordinates touches at most, parts lying behind each other.
TQ_FN constexpr int tq_num_touched(int num) {
  return (num + 31 - (num % 16 == 0 ? 16 : num % 8 == 0 ? 8 : num % 4 == 0 ? 4 : 2)) / 16;
}

// Part `part` (NUM coordinates) of a plane of one bit a coordinate, which begins at byte AT of rows of ROW bytes, of two
// rows: as words of 16 fields, the first row's bit below the second's. Behind the part there is anything.
template <int NUM, int ROW, int AT>
TQ_FN void tq_two_tokens(const uchar* rows, uint row_0, uint row_1, uint part, uint* out) {
  const int TOUCHED = tq_num_touched(NUM), PACKED = (TOUCHED + 1) / 2;
  const uint first = part * NUM;
  uint x[2][PACKED + 1], fields[2 * PACKED + 1];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint row = i == 0 ? row_0 : row_1;
    if (TOUCHED == 1) x[i][0] = reinterpret_cast<const ushort*>(rows + row * ROW + AT)[first / 16];
    else if (NUM % 16 == 0) tq_bits<NUM, ROW, AT>(rows, row, part, x[i]);
    else tq_bits_from<16 * TOUCHED, ROW>(rows, row, 8 * AT + first / 16 * 16, x[i]);
  }
#pragma unroll
  for (int i = 0; i < PACKED; i++) {
    const uint low = tq_select(0x55555555u, x[0][i], x[1][i] << 1);
    const uint high = tq_select(0x55555555u, x[0][i] >> 1, x[1][i]);
    fields[2 * i] = __byte_perm(low, high, 0x5410);
    fields[2 * i + 1] = __byte_perm(low, high, 0x7632);
  }
  fields[2 * PACKED] = 0;
#pragma unroll
  for (int i = 0; i < (NUM + 15) / 16; i++) {
    out[i] = NUM % 16 == 0 ? fields[i] : __funnelshift_r(fields[i], fields[i + 1], 2 * (first & 15));
  }
}

// Branch bits of a part of two tokens, and what levels modulo 4 are made of. before_lane: has the part before.
template <int NUM>
struct TqBranches {
  uint branch[(NUM + 15) / 16], back[(NUM + 15) / 16], high[(NUM + 15) / 16];
};
template <int NUM, int ROW>
TQ_FN TqBranches<NUM> tq_branches(const uchar* rows, uint row_0, uint row_1, uint part, uint before_lane) {
  const int BLOCKS = (NUM + 15) / 16;
  TqBranches<NUM> made;
  tq_two_tokens<NUM, ROW, 0>(rows, row_0, row_1, part, made.branch);
  const uint from_before = tq_shuffle(made.branch[BLOCKS - 1] << 2 * (16 * BLOCKS - NUM), before_lane);
  uint before = part == 0 ? 0u : from_before;
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    const uint x = made.branch[i];
    made.back[i] = __funnelshift_r(before, x, 30);
    made.high[i] = x ^ __funnelshift_r(before, x, 28) ^ __funnelshift_r(before, x, 26);
    before = x;
  }
  return made;
}

// Bytes of two keys, two words a block of 16; tq_trellis_byte says which is pair n.
template <int NUM, int DIM, int BITS>
TQ_FN void tq_trellis_keys(const uchar* rows, uint row_0, uint row_1, TqLane at, uint* words_0, uint* words_1) {
  const int ROW = DIM * BITS / 8, PLANE = DIM / 8, BLOCKS = (NUM + 15) / 16;
  const TqBranches<NUM> made = tq_branches<NUM, ROW>(rows, row_0, row_1, at.c, 4 * at.r + (at.c + 3) % 4);
  uint own[2][BLOCKS + 1];
  if (BITS == 2) {
    tq_two_tokens<NUM, ROW, PLANE>(rows, row_0, row_1, at.c, own[0]);
  } else {
    tq_bits<2 * NUM, ROW, PLANE>(rows, row_0, at.c, own[0]);
    tq_bits<2 * NUM, ROW, PLANE>(rows, row_1, at.c, own[1]);
  }
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    const uint back = made.back[i], high = made.high[i];
    const uint subsets_0 = tq_select(0x55555555u, back, high << 1);
    const uint subsets_1 = tq_select(0x55555555u, back >> 1, high);
    words_0[2 * i] = tq_even_nibbles(subsets_0, own[0][i]);
    words_0[2 * i + 1] = tq_odd_nibbles(subsets_0, own[0][i]);
    // of two bits the second token's own bit lies above the first one's
    words_1[2 * i] = BITS == 2 ? tq_select(0x33333333u, subsets_1, own[0][i] << 1)
                               : tq_even_nibbles(subsets_1, own[1][i]);
    words_1[2 * i + 1] = tq_odd_nibbles(subsets_1, BITS == 2 ? own[0][i] >> 1 : own[1][i]);
  }
}
// Pair n is coordinates 4 (n / 2) + n % 2 of the part and the second next.
TQ_FN constexpr int tq_trellis_byte(int n) { return (n / 8 * 2 + n % 2) * 4 + n / 2 % 4; }

// Bytes of two tokens' values: of coordinate 16i + 4m + w, byte m of words[4i + w].
template <int NUM, int DIM, int BITS>
TQ_FN void tq_trellis_values(const uchar* rows, uint row, TqLane at, uint* words) {
  const int ROW = DIM * BITS / 8, PLANE = DIM / 8, BLOCKS = (NUM + 15) / 16;
  const TqBranches<NUM> made = tq_branches<NUM, ROW>(rows, row, row + 1, at.r, (4 * at.r + at.c + 28) % 32);
  uint own[2][BLOCKS + 1];
  if (BITS == 2) {
    tq_two_tokens<NUM, ROW, PLANE>(rows, row, row + 1, at.r, own[0]);
  } else {
    tq_bits<2 * NUM, ROW, PLANE>(rows, row, at.r, own[0]);
    tq_bits<2 * NUM, ROW, PLANE>(rows, row + 1, at.r, own[1]);
  }
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    const uint even = tq_even_nibbles(made.back[i], made.high[i]);
    const uint odd = tq_select(0x33333333u, made.branch[i], made.high[i]);  // b[i-1] lies one field lower
    uint upper[4];  // own bits, above each word's nibbles
    if (BITS == 2) {
      upper[0] = own[0][i] << 4;
      upper[1] = own[0][i] << 2;
      upper[2] = own[0][i];
      upper[3] = own[0][i] >> 2;
    } else {
      upper[2] = tq_even_nibbles(own[0][i], own[1][i]);
      upper[3] = tq_odd_nibbles(own[0][i], own[1][i]);
      upper[0] = upper[2] << 4;
      upper[1] = upper[3] << 4;
    }
    words[4 * i] = tq_select(0x0f0f0f0fu, even, upper[0]);
    words[4 * i + 1] = tq_select(0x0f0f0f0fu, odd, upper[1]);
    words[4 * i + 2] = tq_select(0x0f0f0f0fu, even >> 4, upper[2]);
    words[4 * i + 3] = tq_select(0x0f0f0f0fu, odd >> 4, upper[3]);
  }
}

// The levels of a byte's first and second value.
template <int BITS>
TQ_FN uint tq_level_of_key(uint byte, int which) { return byte >> 4 * which & ((2u << BITS) - 1); }
template <int BITS>
TQ_FN uint tq_level_of_value(uint byte, int which) {
  const uint own = byte >> (4 + (BITS - 1) * which) & ((1u << (BITS - 1)) - 1);
  return own << 2 | (byte >> (2 + which) & 1) << 1 | (byte >> which & 1);
}

// The table of half pairs by bytes, as tq_fill_pairs makes it of scalar codes. A lane holds one level's value, number
// lane % 2^(BITS + 1).
template <int BITS, bool IS_KEY, int PITCH, int NUM_THREADS>
TQ_FN void tq_fill_trellis_pairs(uchar* table, float value, uint tid) {
  const uint step = NUM_THREADS / 8, num_entries = PITCH == 256 || BITS == 3 ? 256 : IS_KEY ? 128 : 64;
#pragma unroll
  for (uint k = 0; k < (num_entries + step - 1) / step; k++) {
    const uint byte = (tid >> 3) + k * step;
    const float low = __shfl_sync(~0u, value, IS_KEY ? tq_level_of_key<BITS>(byte, 0) : tq_level_of_value<BITS>(byte, 0));
    const float high = __shfl_sync(~0u, value, IS_KEY ? tq_level_of_key<BITS>(byte, 1) : tq_level_of_value<BITS>(byte, 1));
    const uint x = tq_half_pair(low, high);
    if (byte >= num_entries) break;
    *reinterpret_cast<uint4*>(table + (tid & 7) * 16 + byte * PITCH) = make_uint4(x, x, x, x);
  }
}
