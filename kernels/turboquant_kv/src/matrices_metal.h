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
#include "common.h"

TQ_FN int tq_lane_row(uint lane) { return int((lane >> 2 & 4) | (lane >> 1 & 3)); }
TQ_FN int tq_lane_column(uint lane) { return int((lane >> 2 & 2) | (lane & 1)); }

TQ_FN half2 tq_two(half a, half b) { return half2(a, b); }
TQ_FN float2 tq_two(float a, float b) { return float2(a, b); }

// Entries of a table of pairs; codes of 8 bits are looked up one by one.
constexpr int tq_num_pairs(int bits) { return bits == 8 ? 256 : 1 << (2 * bits); }

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

// The centroids of codes 2n and 2n + 1.
template <int BITS, typename Pair>
TQ_FN Pair tq_pair_of(const TQ_SHARED Pair* table, const TQ_THREAD uint* words, int n) {
  const int at = 2 * BITS * n, shift = at & 31;
  uint x = words[at >> 5] >> shift;
  if (shift + 2 * BITS > 32) x |= words[(at >> 5) + 1] << (32 - shift);
  if (BITS == 8) return tq_two(table[x & 255u].x, table[x >> 8 & 255u].x);
  return table[x & ((1u << (2 * BITS & 15)) - 1)];
}
