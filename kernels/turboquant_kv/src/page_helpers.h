// Helpers of the kernels over whole pages, where LANES neighbouring lanes of a warp share a vector.
//
// H = kron(A, S), A of order BASE and S Sylvester's (rotation.py). Of a power of two dims BASE is 1 and a lane holds
// units of eight dims, 8 * (LANES * k + part) + 0..7: a unit's codes are BITS bytes. Of others a lane holds a column,
// the dims LANES * i + part of all i < BASE: A then mixes what one lane holds, and S what all of them hold.

// The Hadamard butterfly over a vector's lanes; each mixes the PER values that it holds beforehand.
template <int PER, int LANES>
TQ_FN void tq_spread(TQ_THREAD float* x, uint lane) {
#pragma unroll
  for (uint mask = 1; mask < uint(LANES); mask *= 2) {
    const float sign = lane & mask ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < PER; i++) x[i] = tq_shuffle_xor(x[i], mask) + sign * x[i];
  }
}

// H, or with A transposed its transpose: the kernel's text says which of both tq_base is, signs of A's rows as bits.
template <int BASE, int PER, int LANES>
TQ_FN void tq_rotate(TQ_THREAD float* x, uint lane) {
  if (BASE == 1) {
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
  } else {
    float from[PER];
#pragma unroll
    for (int i = 0; i < PER; i++) from[i] = x[i];
#pragma unroll
    for (int i = 0; i < PER; i++) {
      x[i] = 0.0f;
#pragma unroll
      for (int k = 0; k < PER; k++) x[i] += (tq_base(i) >> k) & 1 ? -from[k] : from[k];
    }
  }
  tq_spread<PER, LANES>(x, lane);
}

// Eight neighbours of a row; prelude_cuda.h has wide stores.
template <typename Exact>
TQ_FN void tq_store8(TQ_DEVICE Exact* p, const TQ_THREAD float* x) {
  for (int i = 0; i < 8; i++) p[i] = Exact(x[i]);
}

template <int LANES>
TQ_FN float tq_vector_sum(float x) {
#pragma unroll
  for (uint mask = 1; mask < uint(LANES); mask *= 2) x += tq_shuffle_xor(x, mask);
  return x;
}

// The eight codes of one unit as BITS bytes, low ones first. A vector of a power of two dims begins at a whole word, so
// that three bytes are two aligned words at most, of which the second lies in the vector too.
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

// One code of a vector; never reads past its end.
template <int BITS>
TQ_FN uint tq_code_of(const TQ_DEVICE uchar* vector, int d) {
  const int bit = d * BITS, shift = bit & 7;
  uint word = vector[bit >> 3];
  if (shift + BITS > 8) word |= uint(vector[(bit >> 3) + 1]) << 8;
  return (word >> shift) & ((1u << BITS) - 1);
}
