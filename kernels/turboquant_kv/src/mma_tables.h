// Packed codes to half pairs for tensor cores: a part of a vector's codes as words, and the tables that a pair of codes
// indexes.
#pragma once
#include "fragments_cuda.h"

// BITS bits of a packed vector, from any bit on; vectors of ROW bytes begin at a multiple of 16 bytes in shared memory: as
// 32-bit words, of which the last may hold bits of what follows. One word more may be read than holds any of these bits:
// it lies in the ring's tile, scales follow.
template <int BITS, int ROW>
TQ_FN void tq_bits_from(const uchar* rows, uint row, uint first_bit, uint* out) {
  // Of vectors of whole words all rows share the place in a vector, which is then found once for all.
  const uint whole = ROW % 4 == 0 ? row * (ROW / 4) : 0, first = (ROW % 4 == 0 ? 0 : row * (8 * ROW)) + first_bit;
  const uint* p = reinterpret_cast<const uint*>(rows) + whole + (first >> 5);
  uint x[(BITS + 31) / 32 + 1];
#pragma unroll
  for (int i = 0; i < (BITS + 31) / 32 + 1; i++) x[i] = p[i];
#pragma unroll
  for (int i = 0; i < (BITS + 31) / 32; i++) out[i] = __funnelshift_r(x[i], x[i + 1], first & 31);
}

// Part `part` of a vector's codes, BITS bits long, as above; parts begin at byte AT of a vector.
template <int BITS, int ROW, int AT = 0>
TQ_FN void tq_bits(const uchar* rows, uint row, uint part, uint* out) {
  if (BITS % 128 == 0 && ROW % 16 == 0 && AT % 16 == 0) {
    const uint4* p = reinterpret_cast<const uint4*>(rows + row * ROW + AT + part * (BITS / 8));
#pragma unroll
    for (int i = 0; i < BITS / 128; i++) {
      const uint4 x = p[i];
      out[4 * i] = x.x;
      out[4 * i + 1] = x.y;
      out[4 * i + 2] = x.z;
      out[4 * i + 3] = x.w;
    }
  } else if (BITS % 64 == 0 && ROW % 8 == 0 && AT % 8 == 0) {
    const uint2* p = reinterpret_cast<const uint2*>(rows + row * ROW + AT + part * (BITS / 8));
#pragma unroll
    for (int i = 0; i < BITS / 64; i++) {
      const uint2 x = p[i];
      out[2 * i] = x.x;
      out[2 * i + 1] = x.y;
    }
  } else if (BITS % 32 == 0 && ROW % 4 == 0 && AT % 4 == 0) {
    const uint* p = reinterpret_cast<const uint*>(rows + row * ROW + AT + part * (BITS / 8));
#pragma unroll
    for (int i = 0; i < BITS / 32; i++) out[i] = p[i];
  } else {
    tq_bits_from<BITS, ROW>(rows, row, 8 * AT + part * BITS, out);
  }
}

// Half pair n of packed codes: words hold them from bit 0 on, later_words are the same bits from bit 4 on (3 bits, PITCH 256
// only). A table holds each pair 32 times, so that lanes never meet in a bank; entries are PITCH bytes apart. With PITCH 256
// an entry is found by a whole byte of the codes, whose place in the address one byte permutation gives: pairs of 4 bits are
// bytes; of 3 bits, four pairs are three bytes, and each pair is the low or the high 6 bits of a byte, if not of these words
// then of later_words. The low ones are found in `table`, the high ones in `high_table`.
// Else by its bits in MASK.
template <int BITS, int PITCH, uint MASK = (1u << (2 * BITS)) - 1>
TQ_FN uint tq_pair_at(const uchar* table, const uchar* high_table, const uint* words, const uint* later_words, int n,
                      uint lane_4) {
  const int at = 2 * BITS * n, word = at >> 5, shift = at & 31;
  const int LOG_PITCH = PITCH == 256 ? 8 : 7;
  uint x;
  if (PITCH == 256 && BITS >= 3) {
    const bool later = BITS == 3 && (n % 4 == 1 || n % 4 == 2), high = BITS == 3 && n % 2 == 1;
    const int byte = BITS == 4 ? n : n / 4 * 3 + (n % 4 == 2 ? 1 : n % 4 == 3 ? 2 : 0);
    x = __byte_perm((later ? later_words : words)[byte >> 2], lane_4, 0x5504 | (byte & 3) << 4);
    return *reinterpret_cast<const uint*>((high ? high_table : table) + x);
  }
  if (shift + 2 * BITS > 32) x = __funnelshift_r(words[word], words[word + 1], shift) << LOG_PITCH;
  else x = shift >= LOG_PITCH ? words[word] >> (shift - LOG_PITCH) : words[word] << (LOG_PITCH - shift);
  return *reinterpret_cast<const uint*>(table + ((x & (MASK << LOG_PITCH)) | lane_4));
}
// The later_words of that.
template <int BITS, int PITCH, int NUM>
TQ_FN void tq_later_words(const uint* words, uint* later_words) {
  if (BITS != 3 || PITCH != 256) return;
#pragma unroll
  for (int i = 0; i < NUM; i++) later_words[i] = i + 1 < NUM ? __funnelshift_r(words[i], words[i + 1], 4) : words[i] >> 4;
}

// These tables. A lane holds one centroid, number lane % 2^BITS, and hands it round; a thread's pairs have one first code.
template <int BITS, int PITCH, int NUM_THREADS>
TQ_FN void tq_fill_pairs(uchar* table, uchar* high_table, float centroid, uint tid) {
  const uint mask = (1u << BITS) - 1, num_pairs = 1u << (2 * BITS), step = NUM_THREADS / 8;
  static_assert(NUM_THREADS / 8 % (1 << BITS) == 0, "a thread's first code would change");
  const float low = __shfl_sync(~0u, centroid, tid >> 3 & mask);
#pragma unroll
  for (uint k = 0; k < (num_pairs + step - 1) / step; k++) {
    const uint pair = (tid >> 3) + k * step;
    const uint x = tq_half_pair(low, __shfl_sync(~0u, centroid, pair >> BITS & mask));
    if (pair >= num_pairs) break;
    const uint4 four = make_uint4(x, x, x, x);
    uchar* to = table + (tid & 7) * 16;
    if (BITS == 3 && PITCH == 256) {
      uchar* high_to = high_table + (tid & 7) * 16;
#pragma unroll
      for (uint i = 0; i < 4; i++) {
        *reinterpret_cast<uint4*>(to + (pair + num_pairs * i) * PITCH) = four;
        *reinterpret_cast<uint4*>(high_to + (4 * pair + i) * PITCH) = four;
      }
    } else {
      *reinterpret_cast<uint4*>(to + pair * PITCH) = four;
    }
  }
}
