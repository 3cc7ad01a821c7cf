// Metal's 8x8 matrices as the decode kernel uses them: a lane's two elements, its part of a packed vector, pairs of codes.
//
// Lane (r, c) holds elements (r, 2c) and (r, 2c + 1) of a matrix; lanes lie so (row by row, lane numbers):
//
//   0  1  8  9
//   2  3 10 11
//   4  5 12 13     columns of two elements; rows 4 to 7 are lanes 16 more
//   6  7 14 15
#pragma once
#include <metal_simdgroup_matrix>
#include "trellis.h"

TQ_FN int tq_lane_row(uint lane) { return int((lane >> 2 & 4) | (lane >> 1 & 3)); }
TQ_FN int tq_lane_column(uint lane) { return int((lane >> 2 & 2) | (lane & 1)); }

TQ_FN half2 tq_two(half a, half b) { return half2(a, b); }
TQ_FN float2 tq_two(float a, float b) { return float2(a, b); }

// Entries of a table of pairs; codes of 8 bits are looked up one by one, pairs of a trellis are bytes.
constexpr int tq_num_pairs(int bits, int trellis) { return bits == 8 || trellis != 0 ? 256 : 1 << (2 * bits); }

// The lane's two neighbours in a row, as MLX's own attention kernels take them.
template <typename T>
TQ_FN TQ_THREAD vec<T, 2>& tq_elements(TQ_THREAD simdgroup_matrix<T, 8, 8>& matrix) {
  return reinterpret_cast<TQ_THREAD vec<T, 2>&>(matrix.thread_elements());
}

// Quarter `part` of a packed vector, BITS bits, as 32-bit words, read as widely as its place allows: vectors are 4 * BITS
// bits long and begin at multiples of that.
template <int BITS>
TQ_FN void tq_quarter(const TQ_DEVICE uchar* vector, int part, TQ_THREAD uint* out) {
  const TQ_DEVICE uchar* from = vector + (part * BITS >> 3);
  if (BITS % 128 == 0) {
#pragma unroll
    for (int i = 0; i < BITS / 128; i++) {
      const uint4 x = reinterpret_cast<const TQ_DEVICE uint4*>(from)[i];
      out[4 * i] = x.x;
      out[4 * i + 1] = x.y;
      out[4 * i + 2] = x.z;
      out[4 * i + 3] = x.w;
    }
  } else if (BITS % 64 == 0) {
#pragma unroll
    for (int i = 0; i < BITS / 64; i++) {
      const uint2 x = reinterpret_cast<const TQ_DEVICE uint2*>(from)[i];
      out[2 * i] = x.x;
      out[2 * i + 1] = x.y;
    }
  } else if (BITS % 32 == 0) {
#pragma unroll
    for (int i = 0; i < BITS / 32; i++) out[i] = reinterpret_cast<const TQ_DEVICE uint*>(from)[i];
  } else if (BITS % 16 == 0) {
    const TQ_DEVICE ushort* halves = reinterpret_cast<const TQ_DEVICE ushort*>(from);
#pragma unroll
    for (int i = 0; i < BITS / 32; i++) out[i] = uint(halves[2 * i]) | uint(halves[2 * i + 1]) << 16;
    out[BITS / 32] = halves[BITS / 16 - 1];
  } else {
    // Whole bytes, or an odd number of half ones: then odd parts begin in a byte's middle.
    const int NUM_WORDS = (BITS + 31) / 32;
#pragma unroll
    for (int i = 0; i < NUM_WORDS; i++) out[i] = 0;
#pragma unroll
    for (int i = 0; i < (BITS + BITS % 8) / 8; i++) out[i / 4] |= uint(from[i]) << 8 * (i & 3);
    if (BITS % 8 != 0 && (part & 1) != 0) {
#pragma unroll
      for (int i = 0; i < NUM_WORDS; i++) out[i] = out[i] >> 4 | (i + 1 < NUM_WORDS ? out[i + 1] << 28 : 0u);
    }
  }
}

// Words that hold 16 dims of a trellis.
constexpr int tq_words_of_16(int bits) { return bits == 4 ? 3 : 2; }

// Quarter `part` of a packed vector of trellis codes as nibbles, a level each: of each 16 dims a word of the even ones and
// a word of the odd ones. Of 4 bits a third word has their top bits, in bit 0 of fields, and nibbles are inverted where
// those are set: the level's value is then that of the nibble with the other sign.
template <int DIM, int BITS>
TQ_FN void tq_trellis_quarter(const TQ_DEVICE uchar* vector, int part, TQ_THREAD uint* out) {
  const int NUM = DIM / 4, BLOCKS = (NUM + 15) / 16, LAST = DIM / 16 - 1, STEP = tq_words_of_16(BITS);
  const int SINGLE = (BITS - 1) * DIM / 16;  // where the plane of 2 bits' only or 4 bits' top own bit begins
  const TQ_DEVICE ushort* planes = reinterpret_cast<const TQ_DEVICE ushort*>(vector);
  const int first = part * NUM / 16, shift = part * NUM % 16 * 2;  // a part may begin within a block
  uint own[BLOCKS];
  if (BITS > 2) tq_quarter<2 * NUM>(vector + DIM / 8, part, own);
  uint before = first > 0 ? tq_fields(planes[first - 1]) : 0u;
  uint branch = tq_fields(planes[first]), single = BITS != 3 ? tq_fields(planes[SINGLE + first]) : 0u;
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    // of what lies behind the vector nothing is read, and nothing is needed
    const int next = first + i + 1 < LAST ? first + i + 1 : LAST;
    const uint next_branch = tq_fields(planes[next]);
    uint subsets = tq_subsets(before, branch), one = single;
    if (NUM % 16 != 0 && shift != 0) subsets = subsets >> shift | tq_subsets(branch, next_branch) << (32 - shift);
    if (BITS != 3) {
      const uint next_single = tq_fields(planes[SINGLE + next]);
      if (NUM % 16 != 0 && shift != 0) one = one >> shift | next_single << (32 - shift);
      single = next_single;
    }
    uint two = BITS == 2 ? one : own[i];
    if (BITS == 4) {
      subsets ^= 3 * one;
      two ^= 3 * one;
      out[STEP * i + STEP - 1] = one;
    }
    out[STEP * i] = tq_even_nibbles(subsets, two);
    out[STEP * i + 1] = tq_odd_nibbles(subsets, two);
    before = branch;
    branch = next_branch;
  }
}

// The centroids of codes 2n and 2n + 1.
template <int BITS, typename Pair>
TQ_FN Pair tq_pair_of(const TQ_SHARED Pair* table, const TQ_THREAD uint* words, int n) {
  const int at = 2 * BITS * n, shift = at & 31;
  uint x = words[at >> 5] >> shift;
  if (shift + 2 * BITS > 32) x |= words[(at >> 5) + 1] << (32 - shift);
  if (BITS == 8) return tq_two(table[x & 255u].x, table[x >> 8 & 255u].x);
  return table[x & ((1u << (2 * BITS & 15)) - 1)];
}

// Which dims of a quarter pair n has: its first one, and how far behind the second lies.
template <int IS_TRELLIS>
TQ_FN int tq_first_dim(int n) { return IS_TRELLIS ? 4 * (n / 2) + n % 2 : 2 * n; }
template <int IS_TRELLIS>
TQ_FN int tq_dim_step() { return IS_TRELLIS ? 2 : 1; }

// The centroids of pair n of codes: of 2n and 2n + 1, or the two of a trellis' byte.
template <int BITS, int IS_TRELLIS, typename Pair>
TQ_FN Pair tq_pair_of_quarter(const TQ_SHARED Pair* table, const TQ_THREAD uint* words, int n) {
  if (!IS_TRELLIS) return tq_pair_of<BITS>(table, words, n);
  const int at = n / 8 * tq_words_of_16(BITS);
  const Pair x = table[words[at + n % 2] >> (8 * (n / 2 % 4)) & 255u];
  if (BITS != 4) return x;
  const uint top = words[at + tq_words_of_16(BITS) - 1] >> (2 * tq_first_dim<1>(n % 8));
  return tq_two((top & 1u) != 0 ? -x.x : x.x, (top & 16u) != 0 ? -x.y : x.y);
}
