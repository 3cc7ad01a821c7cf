// Helpers of the tensor-core kernel: half pairs, packed codes from any byte offset, tables of pairs, exact types.
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

// Part `part` of a vector's codes, BITS bits long, from packed vectors of ROW bytes that begin at a multiple of 16 bytes in
// shared memory: as 32-bit words, of which the last may hold bits of what follows.
template <int BITS, int ROW>
TQ_FN void tq_bits(const uchar* rows, uint row, uint part, uint* out) {
  if (BITS % 128 == 0 && ROW % 16 == 0) {
    const uint4* p = reinterpret_cast<const uint4*>(rows + row * ROW + part * (BITS / 8));
#pragma unroll
    for (int i = 0; i < BITS / 128; i++) {
      const uint4 x = p[i];
      out[4 * i] = x.x;
      out[4 * i + 1] = x.y;
      out[4 * i + 2] = x.z;
      out[4 * i + 3] = x.w;
    }
  } else if (BITS % 64 == 0 && ROW % 8 == 0) {
    const uint2* p = reinterpret_cast<const uint2*>(rows + row * ROW + part * (BITS / 8));
#pragma unroll
    for (int i = 0; i < BITS / 64; i++) {
      const uint2 x = p[i];
      out[2 * i] = x.x;
      out[2 * i + 1] = x.y;
    }
  } else if (BITS % 32 == 0 && ROW % 4 == 0) {
    const uint* p = reinterpret_cast<const uint*>(rows + row * ROW + part * (BITS / 8));
#pragma unroll
    for (int i = 0; i < BITS / 32; i++) out[i] = p[i];
  } else {
    // From any bit. One word more may be read than holds any of these bits: it lies in the ring's tile, scales follow.
    const uint first = row * (8 * ROW) + part * BITS;
    const uint* p = reinterpret_cast<const uint*>(rows) + (first >> 5);
    uint x[(BITS + 31) / 32 + 1];
#pragma unroll
    for (int i = 0; i < (BITS + 31) / 32 + 1; i++) x[i] = p[i];
#pragma unroll
    for (int i = 0; i < (BITS + 31) / 32; i++) out[i] = __funnelshift_r(x[i], x[i + 1], first & 31);
  }
}

// Half pair n of packed codes: words hold them from bit 0 on, later_words are the same bits from bit 4 on (3 bits, PITCH 256
// only). A table holds each pair 32 times, so that lanes never meet in a bank; entries are PITCH bytes apart. With PITCH 256
// an entry is found by a whole byte of the codes, whose place in the address one byte permutation gives: pairs of 4 bits are
// bytes; of 3 bits, four pairs are three bytes, and each pair is the low or the high 6 bits of a byte, if not of these words
// then of later_words. The low ones are found in `table`, the high ones in `high_table`.
template <int BITS, int PITCH>
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
  return *reinterpret_cast<const uint*>(table + ((x & (((1u << (2 * BITS)) - 1) << LOG_PITCH)) | lane_4));
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

// Rows (NUM, D) in shared memory times a matrix (D, D) in device memory, a warp its share of the matrix's rows, so that
// all of it is asked for at once: partial sums (WARPS, NUM, D), to be added after a barrier.
template <int NUM, int D, int WARPS>
TQ_FN void tq_rotate_densely(const float* rows, const float* matrix, float* partial, uint warp, uint lane) {
  const int PER = (D + 31) / 32, SHARE = (D + WARPS - 1) / WARPS;
  float sum[NUM][PER];
#pragma unroll
  for (int row = 0; row < NUM; row++) {
#pragma unroll
    for (int e = 0; e < PER; e++) sum[row][e] = 0.0f;
  }
#pragma unroll 8
  for (int k = 0; k < SHARE; k++) {
    const int i = int(warp) * SHARE + k;
    float x[PER];
#pragma unroll
    for (int e = 0; e < PER; e++) x[e] = i < D && int(lane) + 32 * e < D ? matrix[i * D + lane + 32 * e] : 0.0f;
#pragma unroll
    for (int row = 0; row < NUM; row++) {
      const float y = i < D ? rows[row * D + i] : 0.0f;
#pragma unroll
      for (int e = 0; e < PER; e++) sum[row][e] += y * x[e];
    }
  }
#pragma unroll
  for (int row = 0; row < NUM; row++) {
#pragma unroll
    for (int e = 0; e < PER; e++) {
      if (int(lane) + 32 * e < D) partial[(warp * NUM + row) * D + lane + 32 * e] = sum[row][e];
    }
  }
}
template <int NUM, int D, int WARPS>
TQ_FN float tq_partial_sum(const float* partial, int i) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += partial[w * NUM * D + i];
  return sum;
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
