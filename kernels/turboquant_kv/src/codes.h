// Packed codes (docs/codec.md): codes of BITS bits lie behind each other from bit 0 of a vector on. A unit is eight of
// them, which are BITS bytes.
#pragma once
#include "trellis.h"

// The centroids of a unit's codes.
template <int BITS>
TQ_FN void tq_unit(const TQ_DEVICE uchar* unit, const TQ_SHARED float* book, TQ_THREAD float* out) {
  if (BITS == 8) {
    for (int i = 0; i < 8; i++) out[i] = book[unit[i]];
    return;
  }
  uint word = 0;
  if (BITS == 4) word = *reinterpret_cast<const TQ_DEVICE uint*>(unit);
  if (BITS == 3) word = uint(unit[0]) | (uint(unit[1]) << 8) | (uint(unit[2]) << 16);
  if (BITS == 2) word = *reinterpret_cast<const TQ_DEVICE ushort*>(unit);
  const uint mask = (1u << BITS) - 1;
  for (int i = 0; i < 8; i++) out[i] = book[(word >> ((BITS & 7) * i)) & mask];
}

// The centroids of dimensions d and d + 1 (d even) of a vector.
template <int BITS>
TQ_FN void tq_pair(const TQ_DEVICE uchar* vector, uint d, const TQ_SHARED float* book, TQ_THREAD float* out) {
  if (BITS == 8) {
    out[0] = book[vector[d]];
    out[1] = book[vector[d + 1]];
    return;
  }
  const uint bit = d * BITS;
  const uint shift = bit & 7;
  uint word = vector[bit >> 3];
  if (shift + 2 * BITS > 8) word |= uint(vector[(bit >> 3) + 1]) << 8;  // 3 bits only; never past the vector's end
  const uint mask = (1u << BITS) - 1;
  out[0] = book[(word >> shift) & mask];
  out[1] = book[(word >> (shift + BITS)) & mask];
}

// One code of a vector; never reads past its end.
template <int BITS>
TQ_FN uint tq_code_of(const TQ_DEVICE uchar* vector, int d) {
  const int bit = d * BITS, shift = bit & 7;
  uint word = vector[bit >> 3];
  if (shift + BITS > 8) word |= uint(vector[(bit >> 3) + 1]) << 8;
  return (word >> shift) & ((1u << BITS) - 1);
}

// A unit as two words, the second for 8 bits only. A vector of a power of two dims begins at a whole word, so that three
// bytes are two aligned words at most, of which the second lies in the vector too.
template <int BITS>
TQ_FN void tq_read_unit(const TQ_DEVICE uchar* vector, int unit, TQ_THREAD uint* words) {
  words[1] = 0;
  if (BITS == 2) words[0] = reinterpret_cast<const TQ_DEVICE ushort*>(vector)[unit];
  if (BITS == 4) words[0] = reinterpret_cast<const TQ_DEVICE uint*>(vector)[unit];
  if (BITS == 8) {
    words[0] = reinterpret_cast<const TQ_DEVICE uint*>(vector)[2 * unit];
    words[1] = reinterpret_cast<const TQ_DEVICE uint*>(vector)[2 * unit + 1];
  }
  if (BITS == 3) {
    const int word = 3 * unit / 4, shift = 8 * (3 * unit % 4);
    words[0] = reinterpret_cast<const TQ_DEVICE uint*>(vector)[word] >> shift;
    if (shift > 8) words[0] |= reinterpret_cast<const TQ_DEVICE uint*>(vector)[word + 1] << (32 - shift);
  }
}

// The inverse. Of 3 bits four lanes with neighbouring units make three words: all lanes of a warp must come here.
template <int BITS>
TQ_FN void tq_write_unit(TQ_DEVICE uchar* vector, int unit, const TQ_THREAD uint* words, bool is_wanted, uint lane) {
  if (BITS == 3) {
    const int shift = 8 * (unit % 4);
    const uint next = tq_shuffle(words[0], (lane + 1) & 31);
    if (is_wanted && shift < 24) {
      reinterpret_cast<TQ_DEVICE uint*>(vector)[unit / 4 * 3 + unit % 4] = words[0] >> shift | next << (24 - shift);
    }
  } else if (is_wanted) {
    if (BITS == 2) reinterpret_cast<TQ_DEVICE ushort*>(vector)[unit] = ushort(words[0]);
    if (BITS == 4) reinterpret_cast<TQ_DEVICE uint*>(vector)[unit] = words[0];
    if (BITS == 8) {
      reinterpret_cast<TQ_DEVICE uint*>(vector)[2 * unit] = words[0];
      reinterpret_cast<TQ_DEVICE uint*>(vector)[2 * unit + 1] = words[1];
    }
  }
}

// Where code `i` of the units that a lane holds lies in their words, two a unit.
template <int BITS>
TQ_FN int tq_word_of_code(int i) { return i / 8 * 2 + (BITS == 8 ? i / 4 % 2 : 0); }
template <int BITS>
TQ_FN int tq_shift_of_code(int i) { return BITS * i % (BITS == 8 ? 32 : 8 * BITS); }
