// Helpers of the tensor-core kernel: half pairs, packed codes from any byte offset, tables of pairs, exact types.
TQ_FN uint tq_half_pair(float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint*>(&pair);
}

// BYTES bytes at offset part * BYTES of a vector of ROW bytes (a multiple of 4, and so aligned), into 32-bit words.
template <int BYTES, int ROW>
TQ_FN void tq_words(const uchar* row, uint part, uint* out) {
  if (BYTES % 16 == 0) {
    const uint4* p = reinterpret_cast<const uint4*>(row + part * BYTES);
#pragma unroll
    for (int i = 0; i < BYTES / 16; i++) {
      const uint4 x = p[i];
      out[4 * i] = x.x;
      out[4 * i + 1] = x.y;
      out[4 * i + 2] = x.z;
      out[4 * i + 3] = x.w;
    }
  } else if (BYTES % 8 == 0 && ROW % 8 == 0) {
    const uint2* p = reinterpret_cast<const uint2*>(row + part * BYTES);
#pragma unroll
    for (int i = 0; i < BYTES / 8; i++) {
      const uint2 x = p[i];
      out[2 * i] = x.x;
      out[2 * i + 1] = x.y;
    }
  } else if (BYTES % 4 == 0) {
    const uint* p = reinterpret_cast<const uint*>(row + part * BYTES);
#pragma unroll
    for (int i = 0; i < BYTES / 4; i++) out[i] = p[i];
  } else {
    // Words that straddle: one more than needed is read, never past the vector's last.
    const uint first = part * BYTES / 4, shift = (part * BYTES & 3) * 8;
    const uint* p = reinterpret_cast<const uint*>(row);
    uint x[(BYTES + 3) / 4 + 1];
#pragma unroll
    for (int i = 0; i < (BYTES + 3) / 4 + 1; i++) x[i] = p[min(first + i, uint(ROW / 4 - 1))];
#pragma unroll
    for (int i = 0; i < (BYTES + 3) / 4; i++) out[i] = __funnelshift_r(x[i], x[i + 1], shift);
  }
}

// The table's half pair for the COUNT bits from bit `at` of a word array; `at` is a constant once loops are unrolled.
// The table holds each pair 32 times, so that lanes never meet in a bank: an entry is 128 bytes.
template <int COUNT>
TQ_FN uint tq_pair_at(const uchar* table, const uint* words, int at, uint lane_4) {
  const int word = at >> 5, shift = at & 31;
  uint x;
  if (shift + COUNT > 32) x = __funnelshift_r(words[word], words[word + 1], shift) << 7;
  else x = shift >= 7 ? words[word] >> (shift - 7) : words[word] << (7 - shift);
  return *reinterpret_cast<const uint*>(table + ((x & (((1u << COUNT) - 1) << 7)) | lane_4));
}
// That table: 2^(2 BITS) pairs of centroids. A lane keeps one centroid and hands it round.
template <int BITS>
TQ_FN void tq_fill_pairs(uchar* table, const float* book, uint tid, uint num_threads) {
  const uint mask = (1u << BITS) - 1;
  const float mine = book[tid & mask];
  for (uint i = tid; i < 8u << (2 * BITS); i += num_threads) {
    const uint pair = i >> 3;
    const float low = __shfl_sync(~0u, mine, pair & mask), high = __shfl_sync(~0u, mine, pair >> BITS);
    const uint x = tq_half_pair(low, high);
    reinterpret_cast<uint4*>(table)[i] = make_uint4(x, x, x, x);
  }
}

// The same product and pairs in an exact type, and what rounding a pair of weights to bfloat16 leaves over.
template <typename Exact> TQ_FN void tq_mma_as(float* c, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1);
template <> TQ_FN void tq_mma_as<__half>(float* c, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  tq_mma(c, a0, a1, a2, a3, b0, b1);
}
template <> TQ_FN void tq_mma_as<__nv_bfloat16>(float* c, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  tq_mma_bfloat(c, a0, a1, a2, a3, b0, b1);
}
template <typename Exact> TQ_FN uint tq_pair_as(float low, float high);
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
