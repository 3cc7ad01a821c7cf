// CUDA tensor cores: the m16n8k16 product, a transposed 8x8 tile, half pairs, packed codes from any byte offset.
TQ_FN void tq_mma(float* c, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
TQ_FN uint tq_transpose(uint x) {
  uint y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(y) : "r"(x));
  return y;
}
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

// `count` bits from bit `at` of a word array; `at` is a constant once loops are unrolled.
template <int COUNT>
TQ_FN uint tq_bits(const uint* words, int at) {
  const int word = at >> 5, shift = at & 31;
  const uint x = shift + COUNT > 32 ? __funnelshift_r(words[word], words[word + 1], shift) : words[word] >> shift;
  return x & ((1u << COUNT) - 1);
}
