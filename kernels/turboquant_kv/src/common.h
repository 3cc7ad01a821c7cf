// Helpers of all kernels: the constants of the online softmax, reading packed codes, the Hadamard butterfly.

// Scores are base-2 logits. Both stand-ins for minus infinity are finite, so that no mode of arithmetic can make NaN of
// them: exp2(TQ_MASKED - TQ_NO_PEAK) is 0, and so is the weight of a part that saw nothing beside one that did.
#define TQ_NO_PEAK -1e30f
#define TQ_MASKED -2e30f

// Eight consecutive codes, BITS bytes at p, through a table of centroids.
template <int BITS>
TQ_FN void tq_unit(const TQ_DEVICE uchar* p, const TQ_SHARED float* book, TQ_THREAD float* out) {
  if (BITS == 8) {
    for (int i = 0; i < 8; i++) out[i] = book[p[i]];
    return;
  }
  uint word = 0;
  if (BITS == 4) word = *reinterpret_cast<const TQ_DEVICE uint*>(p);
  if (BITS == 3) word = uint(p[0]) | (uint(p[1]) << 8) | (uint(p[2]) << 16);
  if (BITS == 2) word = *reinterpret_cast<const TQ_DEVICE ushort*>(p);
  const uint mask = (1u << BITS) - 1;
  for (int i = 0; i < 8; i++) out[i] = book[(word >> ((BITS & 7) * i)) & mask];
}

// The codes of dimensions d and d + 1 (d even) of one packed vector.
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

// Eight consecutive exact values; prelude_cuda.h has a wider read for 16-bit types.
template <typename Exact>
TQ_FN void tq_load8(const TQ_DEVICE Exact* p, TQ_THREAD float* out) {
  for (int i = 0; i < 8; i++) out[i] = float(p[i]);
}

// In-place Sylvester-Hadamard transform of num_rows vectors of dim (a power of two) in shared memory.
TQ_FN void tq_hadamard(TQ_SHARED float* rows, int num_rows, int dim, uint tid, uint num_threads) {
  for (int width = 1; width < dim; width *= 2) {
    TQ_BARRIER();
    for (int i = int(tid); i < num_rows * dim / 2; i += int(num_threads)) {
      const int low = 2 * i - (i & (width - 1));  // rows are whole multiples of 2 * width: they need no index of their own
      const float a = rows[low], b = rows[low + width];
      rows[low] = a + b;
      rows[low + width] = a - b;
    }
  }
  TQ_BARRIER();
}

// The same over the PER values that each of a warp's 32 lanes holds, lane * PER + i or lane + 32 * i being the
// index: the order of an index's bits does not matter to it.
template <int PER>
TQ_FN void tq_lane_hadamard(TQ_THREAD float* x, uint lane) {
#pragma unroll
  for (int width = 1; width < PER; width *= 2) {
#pragma unroll
    for (int i = 0; i < PER; i++) {
      if (i & width) continue;
      const float a = x[i], b = x[i + width];
      x[i] = a + b;
      x[i + width] = a - b;
    }
  }
#pragma unroll
  for (uint mask = 1; mask < 32; mask *= 2) {
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const float other = tq_shuffle_xor(x[i], mask);
      x[i] = lane & mask ? other - x[i] : x[i] + other;
    }
  }
}
