// Compressed tokens on tensor cores: scores = K (16 tokens x 16 dims) . Q^T (16 dims x 8 rows), output = V^T (16 dims x
// 16 tokens) . P^T (16 tokens x 8 rows), so eight query rows share every unpacked code. Dims and tokens may be summed in
// any order: lane (r, c) = (lane / 4, lane % 4) reads a quarter of the keys of two tokens and an eighth of the values of
// four, contiguous in the canonical layout. A pair of codes indexes a table of half pairs, which is one register of an A
// fragment; value pairs are two tokens of one dim, interleaved by masks. Row i = r, r + 8 of unit u is token
// (r / 2) * BLOCK_TOKENS + 4u + r % 2, and two further: what lane column r / 2 holds of values.
#include "mma_ring.h"
const int K_PART = D * KBITS / 4;  // bits a lane reads
const int V_PART = DV * VBITS / 8;
const int K_WORDS = (K_PART + 31) / 32;
const int V_WORDS = (V_PART + 31) / 32;
const uint EVEN = VBITS == 4 ? 0x0f0f0f0fu : VBITS == 3 ? 0x1c71c7u : 0x3333u;  // even ones of eight codes
if ((D & (D - 1)) == 0) {
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) copy_tile();
}
const float k_centroid = tq_k_book_at(tid % (1 << KBITS)), v_centroid = tq_v_book_at(tid % (1 << VBITS));
tq_fill_pairs<KBITS, PITCH, THREADS>(arena + K_TABLE, arena + K_HIGH_TABLE, k_centroid, tid);
if (V_TABLE != K_TABLE) tq_fill_pairs<VBITS, PITCH, THREADS>(arena + V_TABLE, arena + V_HIGH_TABLE, v_centroid, tid);
#include "mma_queries.h"
if ((D & (D - 1)) != 0) {  // the queries' scratch lay where the rings are
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) copy_tile();
}
__syncthreads();
uint q_fragments[D / 8];
#pragma unroll
for (int i = 0; i < D / 8; i++) {
  q_fragments[i] = reinterpret_cast<const uint*>(shared_q + r * Q_PITCH + c * (D / 4))[i];
}
const float mean_0 = row_mean[2 * c], mean_1 = row_mean[2 * c + 1];
const uint lane_4 = 4 * lane;
num_busy = min(WARPS, (end - first_tile * 32 + TILE - 1) / TILE);

// Tokens [low, limit) that the lane's two query rows see.
const int position_0 = q_start + (chunk * 8 + 2 * c) % QROWS, position_1 = q_start + (chunk * 8 + 2 * c + 1) % QROWS;
const int low_0 = position_0 - SINK + 1 - reach, low_1 = position_1 - SINK + 1 - reach;
int limit_0 = end, limit_1 = end;
if (QROWS > 1) {
  limit_0 = min(end, min(num_pages, max(0, position_0 - SINK) / PAGE) * PAGE);
  limit_1 = min(end, min(num_pages, max(0, position_1 - SINK) / PAGE) * PAGE);
}

int stage = 0, phase = 0;
for (int t0 = begin; t0 < end; t0 += STEP) {
#if TQ_BULK
  tq_barrier_wait(barrier + stage, phase);
#else
  tq_copies_wait<STAGES - 2>();
#endif
  __syncwarp();
  const uchar* from = ring + stage * STAGE_BYTES;
  if (++stage == STAGES) {
    stage = 0;
    phase ^= 1;
  }
  copy_tile();
  const __half* scales = reinterpret_cast<const __half*>(from + SCALES_AT) + (r >> 1) * BLOCK_TOKENS + (r & 1);
  float s[UNITS][4];
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const uint row = (r >> 1) * BLOCK_TOKENS + 4 * u + (r & 1);
    uint k_words[2][K_WORDS + 1];
    tq_bits<K_PART, K_BYTES>(from, row, c, k_words[0]);
    tq_bits<K_PART, K_BYTES>(from, row + 2, c, k_words[1]);
    uint k_later[2][K_WORDS];
    tq_later_words<KBITS, PITCH, K_WORDS>(k_words[0], k_later[0]);
    tq_later_words<KBITS, PITCH, K_WORDS>(k_words[1], k_later[1]);
    auto key_pair = [&](int row, int n) {
      return tq_pair_at<KBITS, PITCH>(arena + K_TABLE, arena + K_HIGH_TABLE, k_words[row], k_later[row], n, lane_4);
    };
    float s_even[4] = {0.0f, 0.0f, 0.0f, 0.0f}, s_odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      tq_mma(i % 2 ? s_odd : s_even, key_pair(0, 2 * i), key_pair(1, 2 * i), key_pair(0, 2 * i + 1),
             key_pair(1, 2 * i + 1), q_fragments[2 * i], q_fragments[2 * i + 1]);
    }
    const float k_scale_0 = __half2float(scales[4 * u]), k_scale_1 = __half2float(scales[4 * u + 2]);
    s[u][0] = (s_even[0] + s_odd[0]) * k_scale_0 + mean_0;
    s[u][1] = (s_even[1] + s_odd[1]) * k_scale_0 + mean_1;
    s[u][2] = (s_even[2] + s_odd[2]) * k_scale_1 + mean_0;
    s[u][3] = (s_even[3] + s_odd[3]) * k_scale_1 + mean_1;
    if (QROWS > 1 || low_1 > t0) {
      const int token = t0 + int(row);
      if (token >= limit_0 || token < low_0) s[u][0] = TQ_MASKED;
      if (token >= limit_1 || token < low_1) s[u][1] = TQ_MASKED;
      if (token + 2 >= limit_0 || token + 2 < low_0) s[u][2] = TQ_MASKED;
      if (token + 2 >= limit_1 || token + 2 < low_1) s[u][3] = TQ_MASKED;
    }
  }
  float n_0 = m_0, n_1 = m_1;
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    n_0 = fmaxf(n_0, fmaxf(s[u][0], s[u][2]));
    n_1 = fmaxf(n_1, fmaxf(s[u][1], s[u][3]));
  }
#include "mma_raise.h"
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const float p_0 = tq_exp2(s[u][0] - m_0), p_1 = tq_exp2(s[u][1] - m_1);
    const float p_2 = tq_exp2(s[u][2] - m_0), p_3 = tq_exp2(s[u][3] - m_1);
    l_0 += p_0 + p_2;
    l_1 += p_1 + p_3;
    const float v_scale_0 = __half2float(scales[TILE + 4 * u]), v_scale_1 = __half2float(scales[TILE + 4 * u + 2]);
    const uint b_0 = tq_transpose(tq_half_pair(p_0 * v_scale_0, p_1 * v_scale_0));
    const uint b_1 = tq_transpose(tq_half_pair(p_2 * v_scale_1, p_3 * v_scale_1));
    uint v_words[4][V_WORDS + 1];
#pragma unroll
    for (int i = 0; i < 4; i++) tq_bits<V_PART, V_BYTES>(from + K_TILE + c * V_BLOCK, 4 * u + i, r, v_words[i]);
#pragma unroll
    for (int j = 0; j < (DV + 63) / 64; j++) {  // eight dims: two registers of four products
      uint x[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint* w = v_words[i];
        const int word = 8 * VBITS * j >> 5, shift = 8 * VBITS * j & 31;
        x[i] = shift + 8 * VBITS > 32 ? __funnelshift_r(w[word], w[word + 1], shift) : w[word] >> shift;
      }
      // Registers of four pairs: even and odd dims of the first two tokens, then of the other two.
      const uint pairs[4] = {(x[0] & EVEN) | ((x[1] & EVEN) << VBITS), ((x[0] >> VBITS) & EVEN) | (x[1] & (EVEN << VBITS)),
                             (x[2] & EVEN) | ((x[3] & EVEN) << VBITS), ((x[2] >> VBITS) & EVEN) | (x[3] & (EVEN << VBITS))};
      uint later[4];
#pragma unroll
      for (int i = 0; i < 4; i++) tq_later_words<VBITS, PITCH, 1>(pairs + i, later + i);
      auto value_pair = [&](int i, int n) {
        return tq_pair_at<VBITS, PITCH>(arena + V_TABLE, arena + V_HIGH_TABLE, pairs + i, later + i, n, lane_4);
      };
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (4 * j + i >= DV / 16) break;
        tq_mma(o[4 * j + i], value_pair(0, i), value_pair(1, i), value_pair(2, i), value_pair(3, i), b_0, b_1);
      }
    }
  }
}
#if !TQ_BULK
tq_copies_wait<0>();
#endif
