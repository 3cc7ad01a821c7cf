// Compressed tokens on tensor cores: scores = K (16 tokens x 16 dims) . Q^T (16 dims x 8 rows), output = V^T (16 dims x
// 16 tokens) . P^T (16 tokens x 8 rows), so eight query rows share every unpacked code. Dims may be summed in any
// order: lane (r, c) = (lane / 4, lane % 4) reads a quarter of the key of tokens r and r + 8, and an eighth of the value
// of tokens 2c, 2c+1, 2c+8, 2c+9, both contiguous in the canonical layout. A pair of codes indexes a table of half
// pairs, which is one register of an A fragment; value pairs are two tokens of one dim, interleaved by masks.
const int K_BYTES = D * KBITS / 8;
const int V_BYTES = DV * VBITS / 8;
const int K_PART = K_BYTES / 4;  // bytes a lane reads
const int V_PART = V_BYTES / 8;
const int K_WORDS = (K_PART + 3) / 4;
const int V_WORDS = (V_PART + 3) / 4;
const int UNITS = TILE / 16;
const uint EVEN = VBITS == 4 ? 0x0f0f0f0fu : VBITS == 3 ? 0x1c71c7u : 0x3333u;  // even ones of eight codes
const int r = int(lane) >> 2, c = int(lane) & 3;

uint q_fragments[D / 8];
#pragma unroll
for (int i = 0; i < D / 8; i++) {
  const float* pair = shared_q + r * D + c * (D / 4) + 2 * i;
  q_fragments[i] = tq_half_pair(pair[0], pair[1]);
}
const float mean_0 = row_mean[2 * c], mean_1 = row_mean[2 * c + 1];
int limit_0 = num_tokens, limit_1 = num_tokens;
if (QROWS > 1) {
  // Rows of one group: the pages before a query's own.
  const int row_0 = chunk * ROWS + 2 * c;
  const int page_0 = max(0, q_start + row_0 % QROWS - SINK) / PAGE;
  const int page_1 = max(0, q_start + (row_0 + 1) % QROWS - SINK) / PAGE;
  limit_0 = min(num_pages, page_0) * PAGE;
  limit_1 = min(num_pages, page_1) * PAGE;
}
__syncthreads();
for (int i = int(tid); i < 32 * K_PAIRS; i += THREADS) {
  const int pair = i >> 5;
  arena[i] = tq_half_pair(k_book[pair & ((1 << KBITS) - 1)], k_book[pair >> KBITS]);
}
if (KBITS != VBITS) {
  for (int i = int(tid); i < 32 * V_PAIRS; i += THREADS) {
    const int pair = i >> 5;
    arena[32 * K_PAIRS + i] = tq_half_pair(v_book[pair & ((1 << VBITS) - 1)], v_book[pair >> VBITS]);
  }
}
__syncthreads();
const uint* k_pairs = arena + lane;
const uint* v_pairs = arena + lane + (KBITS == VBITS ? 0 : 32 * K_PAIRS);

float o[DV / 16][4];
#pragma unroll
for (int j = 0; j < DV / 16; j++) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.0f;
float m_0 = TQ_NO_PEAK, m_1 = TQ_NO_PEAK, l_0 = 0.0f, l_1 = 0.0f;
const int begin = first_tile * 32, end = min(last_tile * 32, num_tokens);
const int* pages = page_table + sequence * meta[1];
// 16 tokens never straddle a page; those beyond the end are read again and masked. A tile's pages are looked up while
// the tile before it is computed on: else every tile would wait for two reads in a row.
int page_ids[UNITS];
#pragma unroll
for (int u = 0; u < UNITS; u++) page_ids[u] = pages[min(begin + int(warp) * TILE + u * 16, end - 16) / PAGE];
for (int t0 = begin + int(warp) * TILE; t0 < end; t0 += WARPS * TILE) {
  uint k_words[UNITS][2][K_WORDS], v_words[UNITS][4][V_WORDS];
  float k_scale[UNITS][2], v_scale[UNITS][2], s[UNITS][4];
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const int token = min(t0 + u * 16, end - 16);
    const ulong row_id = ulong((page_ids[u] * HEADS + head) * PAGE + token % PAGE);
    page_ids[u] = pages[min(t0 + WARPS * TILE + u * 16, end - 16) / PAGE];
    const uchar* k_row = k_codes + (row_id + r) * K_BYTES;
    tq_words<K_PART, K_BYTES>(k_row, c, k_words[u][0]);
    tq_words<K_PART, K_BYTES>(k_row + 8 * K_BYTES, c, k_words[u][1]);
    const uchar* v_row = v_codes + (row_id + 2 * c) * V_BYTES;
    tq_words<V_PART, V_BYTES>(v_row, r, v_words[u][0]);
    tq_words<V_PART, V_BYTES>(v_row + V_BYTES, r, v_words[u][1]);
    tq_words<V_PART, V_BYTES>(v_row + 8 * V_BYTES, r, v_words[u][2]);
    tq_words<V_PART, V_BYTES>(v_row + 9 * V_BYTES, r, v_words[u][3]);
    k_scale[u][0] = __half2float(k_scales[row_id + r]);
    k_scale[u][1] = __half2float(k_scales[row_id + r + 8]);
    v_scale[u][0] = __half2float(v_scales[row_id + r]);
    v_scale[u][1] = __half2float(v_scales[row_id + r + 8]);
  }
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    s[u][0] = s[u][1] = s[u][2] = s[u][3] = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      tq_mma(s[u], k_pairs[32 * tq_bits<2 * KBITS>(k_words[u][0], 4 * KBITS * i)],
             k_pairs[32 * tq_bits<2 * KBITS>(k_words[u][1], 4 * KBITS * i)],
             k_pairs[32 * tq_bits<2 * KBITS>(k_words[u][0], 4 * KBITS * i + 2 * KBITS)],
             k_pairs[32 * tq_bits<2 * KBITS>(k_words[u][1], 4 * KBITS * i + 2 * KBITS)], q_fragments[2 * i],
             q_fragments[2 * i + 1]);
    }
    const int token = t0 + u * 16 + r;
    s[u][0] = s[u][0] * k_scale[u][0] + mean_0;
    s[u][1] = s[u][1] * k_scale[u][0] + mean_1;
    s[u][2] = s[u][2] * k_scale[u][1] + mean_0;
    s[u][3] = s[u][3] * k_scale[u][1] + mean_1;
    if (QROWS > 1 || t0 + u * 16 >= end) {
      if (token >= min(limit_0, end)) s[u][0] = TQ_MASKED;
      if (token >= min(limit_1, end)) s[u][1] = TQ_MASKED;
      if (token + 8 >= min(limit_0, end)) s[u][2] = TQ_MASKED;
      if (token + 8 >= min(limit_1, end)) s[u][3] = TQ_MASKED;
    }
  }
  float n_0 = m_0, n_1 = m_1;
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    n_0 = fmaxf(n_0, fmaxf(s[u][0], s[u][2]));
    n_1 = fmaxf(n_1, fmaxf(s[u][1], s[u][3]));
  }
#pragma unroll
  for (int step = 4; step < 32; step <<= 1) {
    n_0 = fmaxf(n_0, __shfl_xor_sync(~0u, n_0, step));
    n_1 = fmaxf(n_1, __shfl_xor_sync(~0u, n_1, step));
  }
  if (__any_sync(~0u, n_0 > m_0 || n_1 > m_1)) {
    const float f_0 = tq_exp2(m_0 - n_0), f_1 = tq_exp2(m_1 - n_1);
    m_0 = n_0;
    m_1 = n_1;
    l_0 *= f_0;
    l_1 *= f_1;
#pragma unroll
    for (int j = 0; j < DV / 16; j++) {
      o[j][0] *= f_0;
      o[j][1] *= f_1;
      o[j][2] *= f_0;
      o[j][3] *= f_1;
    }
  }
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const float p_0 = tq_exp2(s[u][0] - m_0), p_1 = tq_exp2(s[u][1] - m_1);
    const float p_2 = tq_exp2(s[u][2] - m_0), p_3 = tq_exp2(s[u][3] - m_1);
    l_0 += p_0 + p_2;
    l_1 += p_1 + p_3;
    const uint b_0 = tq_transpose(tq_half_pair(p_0 * v_scale[u][0], p_1 * v_scale[u][0]));
    const uint b_1 = tq_transpose(tq_half_pair(p_2 * v_scale[u][1], p_3 * v_scale[u][1]));
#pragma unroll
    for (int j = 0; j < DV / 64; j++) {  // eight dims: two registers of four products
      uint x[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint* w = v_words[u][i];
        const int word = 8 * VBITS * j >> 5, shift = 8 * VBITS * j & 31;
        x[i] = shift + 8 * VBITS > 32 ? __funnelshift_r(w[word], w[word + 1], shift) : w[word] >> shift;
      }
      const uint low_even = (x[0] & EVEN) | ((x[1] & EVEN) << VBITS);
      const uint low_odd = ((x[0] >> VBITS) & EVEN) | (x[1] & (EVEN << VBITS));
      const uint high_even = (x[2] & EVEN) | ((x[3] & EVEN) << VBITS);
      const uint high_odd = ((x[2] >> VBITS) & EVEN) | (x[3] & (EVEN << VBITS));
      const uint mask = (1u << (2 * VBITS)) - 1;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        tq_mma(o[4 * j + i], v_pairs[32 * ((low_even >> (2 * VBITS * i)) & mask)],
               v_pairs[32 * ((low_odd >> (2 * VBITS * i)) & mask)],
               v_pairs[32 * ((high_even >> (2 * VBITS * i)) & mask)],
               v_pairs[32 * ((high_odd >> (2 * VBITS * i)) & mask)], b_0, b_1);
      }
    }
  }
}

// The warps' parts become one. Dims lie as [dim within the lane's eighth][eighth] so that lanes store without conflicts.
#pragma unroll
for (int step = 4; step < 32; step <<= 1) {
  l_0 += __shfl_xor_sync(~0u, l_0, step);
  l_1 += __shfl_xor_sync(~0u, l_1, step);
}
if (r == 0) {
  row_peak[int(warp) * ROWS + 2 * c] = m_0;
  row_peak[int(warp) * ROWS + 2 * c + 1] = m_1;
  row_mass[int(warp) * ROWS + 2 * c] = l_0;
  row_mass[int(warp) * ROWS + 2 * c + 1] = l_1;
}
__syncthreads();
float top_0 = TQ_NO_PEAK, top_1 = TQ_NO_PEAK;
for (int w = 0; w < WARPS; w++) {
  top_0 = fmaxf(top_0, row_peak[w * ROWS + 2 * c]);
  top_1 = fmaxf(top_1, row_peak[w * ROWS + 2 * c + 1]);
}
const float f_0 = tq_exp2(m_0 - top_0), f_1 = tq_exp2(m_1 - top_1);
const int STRIDE = DV + 4;
float* sums = reinterpret_cast<float*>(arena);
for (int w = 0; w < WARPS; w++) {
  if (int(warp) == w) {
    float* a = sums + 2 * c * STRIDE + r;
    float* b = a + STRIDE;
#pragma unroll
    for (int j = 0; j < DV / 16; j++) {
      a[16 * j] = o[j][0] * f_0 + (w > 0 ? a[16 * j] : 0.0f);
      b[16 * j] = o[j][1] * f_1 + (w > 0 ? b[16 * j] : 0.0f);
      a[16 * j + 8] = o[j][2] * f_0 + (w > 0 ? a[16 * j + 8] : 0.0f);
      b[16 * j + 8] = o[j][3] * f_1 + (w > 0 ? b[16 * j + 8] : 0.0f);
    }
  }
  __syncthreads();
}
const ulong part = (ulong(block_z) * HEADS + block_y) * num_blocks_x + block_x;
for (int i = int(tid); i < LIVE * DV; i += THREADS) {
  const int d = i % DV;
  totals[part * (ROWS * DV) + i] = sums[(i / DV) * STRIDE + (d % (DV / 8)) * 8 + d / (DV / 8)];
}
if (int(tid) < LIVE) {
  float top = TQ_NO_PEAK, sum = 0.0f;
  for (int i = 0; i < WARPS; i++) top = fmaxf(top, row_peak[i * ROWS + tid]);
  for (int i = 0; i < WARPS; i++) sum += row_mass[i * ROWS + tid] * tq_exp2(row_peak[i * ROWS + tid] - top);
  stats[(part * ROWS + tid) * 2] = top;
  stats[(part * ROWS + tid) * 2 + 1] = sum;
}
