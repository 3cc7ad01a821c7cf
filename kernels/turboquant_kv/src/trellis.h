// Trellis codes (docs/codec.md): a plane of branch bits b, then one of own bits, in blocks of 16 coordinates, and
//
//   level[i] = 4 * own[i] + 2 * (b[i] ^ b[i-2] ^ b[i-3]) + b[i-1]
//
// Of three own bits (4t) the highest, `top`, has a plane of its own behind the lower two's. The values of levels are
// antisymmetric, that of level i is minus that of level 31 - i, so that four bits and a sign may stand for five bits.
//
// Here a block is a word of 16 fields: coordinate k has bits 2k and 2k + 1.
#pragma once
#include "common.h"

// A block of one bit a coordinate, as it is packed, to bit 0 of each field.
TQ_FN uint tq_fields(uint packed) { return (packed & 0x5555u) | ((packed << 15) & 0x55550000u); }

// Levels modulo 4 of a block's coordinates, from its branch bits and those of the block before, each in bit 0 of fields.
TQ_FN uint tq_subsets(uint before, uint branch) {
  const uint high = branch ^ (branch << 4 | before >> 28) ^ (branch << 6 | before >> 26);
  return high << 1 | branch << 2 | before >> 30;
}

// Two words of fields to nibbles, `low` the lower two bits: those of even coordinates, and of odd ones.
TQ_FN uint tq_even_nibbles(uint low, uint high) { return tq_select(0x33333333u, low, high << 2); }
TQ_FN uint tq_odd_nibbles(uint low, uint high) { return tq_select(0x33333333u, low >> 2, high); }

// Eight coordinates: levels modulo 4 in the lower half's fields, own bits (the lower two) in the upper half's; their
// top bits in bit 4 of fields, 0 where codes have none.
struct TqTrellisUnit {
  uint levels, top;
};

// Unit `unit` of a packed vector of DIM coordinates.
template <int DIM, int BITS>
TQ_FN TqTrellisUnit tq_trellis_unit(const TQ_DEVICE uchar* vector, int unit) {
  const TQ_DEVICE ushort* planes = reinterpret_cast<const TQ_DEVICE ushort*>(vector);
  const int block = unit / 2, shift = unit % 2 * 16;
  const uint before = block > 0 ? tq_fields(planes[block - 1]) : 0u;
  const uint subsets = tq_subsets(before, tq_fields(planes[block])) >> shift;
  const uint own = BITS == 2 ? tq_fields(planes[DIM / 16 + block]) >> shift : planes[DIM / 16 + unit];
  const uint top = BITS == 4 ? tq_fields(planes[3 * DIM / 16 + block]) >> shift << 4 : 0u;
  return {(subsets & 0xffffu) | own << 16, top};
}

// The level of coordinate i of such a unit.
TQ_FN uint tq_trellis_level(TqTrellisUnit unit, int i) {
  return (unit.top >> (2 * i) & 16u) | (unit.levels >> (14 + 2 * i) & 12u) | (unit.levels >> (2 * i) & 3u);
}
