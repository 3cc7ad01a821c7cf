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
//
// Levels of five bits (4t) are four bits and a sign: where a top bit is set the other four are inverted, which is done
// for both tokens' planes at once, and a look-up in the table of the lower half's levels gets the other sign.
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

// Branch bits of a part of two tokens, what levels modulo 4 are made of, inverted where top bits say so, and those (4
// bits only). before_lane: has the part before.
template <int NUM>
struct TqBranches {
  uint branch[(NUM + 15) / 16], back[(NUM + 15) / 16], high[(NUM + 15) / 16], top[(NUM + 15) / 16];
};
template <int NUM, int DIM, int BITS>
TQ_FN TqBranches<NUM> tq_branches(const uchar* rows, uint row_0, uint row_1, uint part, uint before_lane) {
  const int ROW = DIM * BITS / 8, BLOCKS = (NUM + 15) / 16;
  TqBranches<NUM> made;
  tq_two_tokens<NUM, ROW, 0>(rows, row_0, row_1, part, made.branch);
  if (BITS == 4) tq_two_tokens<NUM, ROW, 3 * DIM / 8>(rows, row_0, row_1, part, made.top);
  const uint from_before = tq_shuffle(made.branch[BLOCKS - 1] << 2 * (16 * BLOCKS - NUM), before_lane);
  uint before = part == 0 ? 0u : from_before;
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    const uint x = made.branch[i], top = BITS == 4 ? made.top[i] : 0u;
    made.back[i] = __funnelshift_r(before, x, 30) ^ top;
    made.high[i] = x ^ __funnelshift_r(before, x, 28) ^ __funnelshift_r(before, x, 26) ^ top;
    before = x;
  }
  return made;
}

// Own bits of that part: of 2 bits both tokens' in own[0], else each token's lower two.
template <int NUM, int DIM, int BITS>
TQ_FN void tq_own_bits(const uchar* rows, uint row_0, uint row_1, uint part, const TqBranches<NUM>& branches,
                       uint (*own)[(NUM + 15) / 16 + 1]) {
  const int ROW = DIM * BITS / 8, PLANE = DIM / 8;
  if (BITS == 2) {
    tq_two_tokens<NUM, ROW, PLANE>(rows, row_0, row_1, part, own[0]);
    return;
  }
  tq_bits<2 * NUM, ROW, PLANE>(rows, row_0, part, own[0]);
  tq_bits<2 * NUM, ROW, PLANE>(rows, row_1, part, own[1]);
  if (BITS == 3) return;
#pragma unroll
  for (int i = 0; i < (NUM + 15) / 16; i++) {
    const uint first = branches.top[i] & 0x55555555u, second = branches.top[i] & 0xaaaaaaaau;
    own[0][i] ^= first ^ (first << 1);
    own[1][i] ^= second ^ (second >> 1);
  }
}

// A half pair with other signs: of its first half where bit `bit` (0 to 15) of `signs` is set, of its second where bit
// `bit` + 16 is.
TQ_FN uint tq_signed(uint pair, uint signs, int bit) { return pair ^ ((signs << (15 - bit)) & 0x80008000u); }

// A block's top bits of two tokens as such signs: of keys, pair n (of eight) of token t has bit 2n + t; of values, both
// tokens' coordinate k has bit 2k, from k = 8 on bit 2(k - 8) + 1.
TQ_FN uint tq_key_signs(uint top) {
  const uint differ = (top ^ (top >> 4)) & 0x00f000f0u;  // nibbles 1 and 2, and 5 and 6, change places
  return __byte_perm(top ^ differ ^ (differ << 4), 0, 0x3120);
}
TQ_FN uint tq_value_signs(uint top) { return tq_fields(top) | tq_fields(top >> 16) << 1; }
TQ_FN constexpr int tq_value_sign_bit(int k) { return k < 8 ? 2 * k : 2 * k - 15; }

// Bytes of two keys, two words a block of 16; tq_trellis_byte says which is pair n. signs: one a block, of 4 bits only.
template <int NUM, int DIM, int BITS>
TQ_FN void tq_trellis_keys(const uchar* rows, uint row_0, uint row_1, TqLane at, uint* words_0, uint* words_1,
                           uint* signs) {
  const int BLOCKS = (NUM + 15) / 16;
  const TqBranches<NUM> made = tq_branches<NUM, DIM, BITS>(rows, row_0, row_1, at.c, 4 * at.r + (at.c + 3) % 4);
  uint own[2][BLOCKS + 1];
  tq_own_bits<NUM, DIM, BITS>(rows, row_0, row_1, at.c, made, own);
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
    if (BITS == 4) signs[i] = tq_key_signs(made.top[i]);
  }
}
// Pair n is coordinates 4 (n / 2) + n % 2 of the part and the second next.
TQ_FN constexpr int tq_trellis_byte(int n) { return (n / 8 * 2 + n % 2) * 4 + n / 2 % 4; }

// Bytes of two tokens' values: of coordinate 16i + 4m + w, byte m of words[4i + w]; signs as above.
template <int NUM, int DIM, int BITS>
TQ_FN void tq_trellis_values(const uchar* rows, uint row, TqLane at, uint* words, uint* signs) {
  const int BLOCKS = (NUM + 15) / 16;
  const TqBranches<NUM> made = tq_branches<NUM, DIM, BITS>(rows, row, row + 1, at.r, (4 * at.r + at.c + 28) % 32);
  uint own[2][BLOCKS + 1];
  tq_own_bits<NUM, DIM, BITS>(rows, row, row + 1, at.r, made, own);
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    const uint even = tq_even_nibbles(made.back[i], made.high[i]);
    const uint odd = BITS == 4 ? tq_odd_nibbles(made.back[i], made.high[i])
                               // b[i-1], which nothing has inverted, lies one field lower
                               : tq_select(0x33333333u, made.branch[i], made.high[i]);
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
    if (BITS == 4) signs[i] = tq_value_signs(made.top[i]);
  }
}

// The levels of a byte's first and second value; of 4 bits without their signs.
template <int BITS>
TQ_FN uint tq_level_of_key(uint byte, int which) { return byte >> 4 * which & (BITS == 2 ? 7u : 15u); }
template <int BITS>
TQ_FN uint tq_level_of_value(uint byte, int which) {
  const uint own = BITS == 2 ? byte >> (4 + which) & 1u : byte >> (4 + 2 * which) & 3u;
  return own << 2 | (byte >> (2 + which) & 1) << 1 | (byte >> which & 1);
}

// The table of half pairs by bytes, as tq_fill_pairs makes it of scalar codes. A lane holds one level's value, number
// lane % 2^(BITS + 1).
template <int BITS, bool IS_KEY, int PITCH, int NUM_THREADS>
TQ_FN void tq_fill_trellis_pairs(uchar* table, float value, uint tid) {
  const uint step = NUM_THREADS / 8, num_entries = PITCH == 256 || BITS >= 3 ? 256 : IS_KEY ? 128 : 64;
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
