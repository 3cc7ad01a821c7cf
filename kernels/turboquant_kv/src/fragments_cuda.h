// Operands of tensor cores: pairs of 16-bit values, the m16n8k16 product in either type.
//
// Lane (r, c) = (lane / 4, lane % 4) holds of a product's operands and sums
//
//   A (16 x 16)   a0: row r, columns 2c, 2c + 1   a1: row r + 8, the same   a2, a3: those rows, columns 8 further
//   B (16 x 8)    b0: rows 2c, 2c + 1 of column r   b1: rows 8 further
//   C (16 x 8)    c[0], c[1]: row r, columns 2c, 2c + 1   c[2], c[3]: row r + 8
#pragma once
#include "common.h"

struct TqLane {
  int r, c;
};
TQ_FN TqLane tq_lane(TqPlace place) { return {int(place.lane) >> 2, int(place.lane) & 3}; }

TQ_FN uint tq_half_pair(float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint*>(&pair);
}

// NUM 32-bit words of device memory, as wide as their number allows: they lie at a multiple of NUM words.
template <int NUM>
TQ_FN void tq_device_words(const void* from, uint* out) {
  if (NUM % 4 == 0) {
#pragma unroll
    for (int i = 0; i < NUM / 4; i++) {
      const uint4 x = reinterpret_cast<const uint4*>(from)[i];
      out[4 * i] = x.x;
      out[4 * i + 1] = x.y;
      out[4 * i + 2] = x.z;
      out[4 * i + 3] = x.w;
    }
  } else if (NUM % 2 == 0) {
#pragma unroll
    for (int i = 0; i < NUM / 2; i++) {
      const uint2 x = reinterpret_cast<const uint2*>(from)[i];
      out[2 * i] = x.x;
      out[2 * i + 1] = x.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < NUM; i++) out[i] = reinterpret_cast<const uint*>(from)[i];
  }
}

// The product and pairs in a type, and what rounding a pair of weights to bfloat16 leaves over. Of other types nobody
// calls them, but the compiler wants to see a body wherever a branch that is never taken names one.
template <typename Exact> TQ_FN void tq_mma_as(float* c, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {}
template <> TQ_FN void tq_mma_as<__half>(float* c, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  tq_mma(c, a0, a1, a2, a3, b0, b1);
}
template <> TQ_FN void tq_mma_as<__nv_bfloat16>(float* c, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  tq_mma_bfloat(c, a0, a1, a2, a3, b0, b1);
}
template <typename Exact> TQ_FN uint tq_pair_as(float low, float high) { return 0u; }
template <> TQ_FN uint tq_pair_as<__half>(float low, float high) { return tq_half_pair(low, high); }
template <> TQ_FN uint tq_pair_as<__nv_bfloat16>(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint*>(&pair);
}
template <typename Exact> TQ_FN uint tq_pair_rest(float low, float high) { return 0u; }
template <> TQ_FN uint tq_pair_rest<__nv_bfloat16>(float low, float high) {
  return tq_pair_as<__nv_bfloat16>(low - __bfloat162float(__float2bfloat16_rn(low)),
                                   high - __bfloat162float(__float2bfloat16_rn(high)));
}
template <typename Exact> TQ_FN bool tq_needs_rest() { return false; }
template <> TQ_FN bool tq_needs_rest<__nv_bfloat16>() { return true; }
