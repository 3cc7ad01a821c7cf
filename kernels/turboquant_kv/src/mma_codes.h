// Compressed tokens on tensor cores: scores = K (16 tokens x 16 dims) . Q^T (16 dims x 8 rows), output = V^T (16 dims x
// 16 tokens) . P^T (16 tokens x 8 rows), so eight query rows share every unpacked code. Dims may be summed in any
// order: lane (r, c) = (lane / 4, lane % 4) reads a quarter of the key of tokens r and r + 8, and an eighth of the value
// of tokens 2c, 2c+1, 2c+8, 2c+9, both contiguous in the canonical layout. A pair of codes indexes a table of half
// pairs, which is one register of an A fragment; value pairs are two tokens of one dim, interleaved by masks.
// Each warp copies its own tiles to its ring STAGES - 1 ahead, asynchronously, and waits for nobody else.
const int K_PART = K_BYTES / 4;  // bytes a lane reads
const int V_PART = V_BYTES / 8;
const int K_WORDS = (K_PART + 3) / 4;
const int V_WORDS = (V_PART + 3) / 4;
const int V_CHUNK = V_BYTES % 16 == 0 ? 16 : 8;  // bytes copied at once
const int K_COPIES = (K_UNIT / 16 + 31) / 32;
const int V_COPIES = (16 * V_BYTES / V_CHUNK + 31) / 32;
const uint EVEN = VBITS == 4 ? 0x0f0f0f0fu : VBITS == 3 ? 0x1c71c7u : 0x3333u;  // even ones of eight codes
const int STEP = WARPS * TILE;
const int begin = first_tile * 32 + int(warp) * TILE, end = min(last_tile * 32, num_tokens);
const int* pages = page_table + sequence * plan[1];
uchar* ring = arena + TABLE_BYTES + 16 * Q_PITCH + int(warp) * RING_BYTES;

// 16 tokens never straddle a page; those beyond the end are read again and masked. A tile's pages are looked up one
// tile before it is copied, so that nothing waits for two reads in a row.
int page_ids[UNITS];
#pragma unroll
for (int u = 0; u < UNITS; u++) page_ids[u] = pages[min(begin + u * 16, end - 16) / PAGE];
int t_copied = begin, stage_copied = 0;
auto copy_tile = [&]() {
  if (t_copied < end) {
    uchar* to = ring + stage_copied * (UNITS * UNIT_BYTES);
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      const int token = min(t_copied + u * 16, end - 16);
      const ulong row_id = ulong((page_ids[u] * HEADS + head) * PAGE + token % PAGE);
      page_ids[u] = pages[min(t_copied + STEP + u * 16, end - 16) / PAGE];
      const uchar* k_from = k_codes + row_id * K_BYTES;
      const uchar* v_from = v_codes + row_id * V_BYTES;
#pragma unroll
      for (int i = 0; i < K_COPIES; i++) {
        const int at = (i * 32 + int(lane)) * 16;
        if (K_UNIT % 512 == 0 || at < K_UNIT) tq_copy<16>(to + at, k_from + at);
      }
#pragma unroll
      for (int i = 0; i < V_COPIES; i++) {
        const int at = (i * 32 + int(lane)) * V_CHUNK;
        if (16 * V_BYTES % (32 * V_CHUNK) == 0 || at < 16 * V_BYTES) {
          tq_copy<V_CHUNK>(to + K_UNIT + at + at / (2 * V_BYTES) * V_GAP, v_from + at);
        }
      }
      if (lane < 4) {
        const __half* from = (lane < 2 ? k_scales : v_scales) + row_id + 8 * (lane & 1);
        tq_copy<16>(to + K_UNIT + 8 * V_PITCH + 16 * lane, from);
      }
      to += UNIT_BYTES;
    }
  }
  tq_copies_end();
  t_copied += STEP;
  stage_copied = stage_copied + 1 == STAGES ? 0 : stage_copied + 1;
};

const bool k_same = KBITS == VBITS;
if ((D & (D - 1)) == 0) {
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) copy_tile();
}
tq_fill_pairs<KBITS>(arena, tq_k_book, tid, THREADS);
if (!k_same) tq_fill_pairs<VBITS>(arena + 128 * K_PAIRS, tq_v_book, tid, THREADS);
MMA_QUERIES
if ((D & (D - 1)) != 0) {
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) copy_tile();
}
__syncthreads();
uint q_fragments[D / 8];
#pragma unroll
for (int i = 0; i < D / 32; i++) {
  const uint4 x = *reinterpret_cast<const uint4*>(shared_q + r * Q_PITCH + c * (D / 4) + 8 * i);
  q_fragments[4 * i] = x.x;
  q_fragments[4 * i + 1] = x.y;
  q_fragments[4 * i + 2] = x.z;
  q_fragments[4 * i + 3] = x.w;
}
const float mean_0 = row_mean[2 * c], mean_1 = row_mean[2 * c + 1];
const uchar* k_pairs = arena;
const uchar* v_pairs = arena + (k_same ? 0 : 128 * K_PAIRS);
const uint lane_4 = 4 * lane;

// Tokens [low, limit) that the lane's two query rows see.
const int position_0 = q_start + (chunk * 8 + 2 * c) % QROWS, position_1 = q_start + (chunk * 8 + 2 * c + 1) % QROWS;
const int low_0 = position_0 - SINK + 1 - reach, low_1 = position_1 - SINK + 1 - reach;
int limit_0 = end, limit_1 = end;
if (QROWS > 1) {
  limit_0 = min(end, min(num_pages, max(0, position_0 - SINK) / PAGE) * PAGE);
  limit_1 = min(end, min(num_pages, max(0, position_1 - SINK) / PAGE) * PAGE);
}

int stage = 0;
for (int t0 = begin; t0 < end; t0 += STEP) {
  tq_copies_wait<STAGES - 2>();
  __syncwarp();
  const uchar* from = ring + stage * (UNITS * UNIT_BYTES);
  stage = stage + 1 == STAGES ? 0 : stage + 1;
  copy_tile();
  float s[UNITS][4];
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const uchar* unit = from + u * UNIT_BYTES;
    uint k_words[2][K_WORDS];
    tq_words<K_PART, K_BYTES>(unit + r * K_BYTES, c, k_words[0]);
    tq_words<K_PART, K_BYTES>(unit + (r + 8) * K_BYTES, c, k_words[1]);
    float s_even[4] = {0.0f, 0.0f, 0.0f, 0.0f}, s_odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      tq_mma(i % 2 ? s_odd : s_even, tq_pair_at<2 * KBITS>(k_pairs, k_words[0], 4 * KBITS * i, lane_4),
             tq_pair_at<2 * KBITS>(k_pairs, k_words[1], 4 * KBITS * i, lane_4),
             tq_pair_at<2 * KBITS>(k_pairs, k_words[0], 4 * KBITS * i + 2 * KBITS, lane_4),
             tq_pair_at<2 * KBITS>(k_pairs, k_words[1], 4 * KBITS * i + 2 * KBITS, lane_4), q_fragments[2 * i],
             q_fragments[2 * i + 1]);
    }
    const __half* scales = reinterpret_cast<const __half*>(unit + K_UNIT + 8 * V_PITCH);
    const float k_scale_0 = __half2float(scales[r]), k_scale_1 = __half2float(scales[r + 8]);
    s[u][0] = (s_even[0] + s_odd[0]) * k_scale_0 + mean_0;
    s[u][1] = (s_even[1] + s_odd[1]) * k_scale_0 + mean_1;
    s[u][2] = (s_even[2] + s_odd[2]) * k_scale_1 + mean_0;
    s[u][3] = (s_even[3] + s_odd[3]) * k_scale_1 + mean_1;
    if (QROWS > 1 || t0 + u * 16 >= end || low_1 > t0) {
      const int token = t0 + u * 16 + r;
      if (token >= limit_0 || token < low_0) s[u][0] = TQ_MASKED;
      if (token >= limit_1 || token < low_1) s[u][1] = TQ_MASKED;
      if (token + 8 >= limit_0 || token + 8 < low_0) s[u][2] = TQ_MASKED;
      if (token + 8 >= limit_1 || token + 8 < low_1) s[u][3] = TQ_MASKED;
    }
  }
  float n_0 = m_0, n_1 = m_1;
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    n_0 = fmaxf(n_0, fmaxf(s[u][0], s[u][2]));
    n_1 = fmaxf(n_1, fmaxf(s[u][1], s[u][3]));
  }
  MMA_RAISE_PEAKS
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const uchar* unit = from + u * UNIT_BYTES;
    const float p_0 = tq_exp2(s[u][0] - m_0), p_1 = tq_exp2(s[u][1] - m_1);
    const float p_2 = tq_exp2(s[u][2] - m_0), p_3 = tq_exp2(s[u][3] - m_1);
    l_0 += p_0 + p_2;
    l_1 += p_1 + p_3;
    const __half* scales = reinterpret_cast<const __half*>(unit + K_UNIT + 8 * V_PITCH + 32);
    const float v_scale_0 = __half2float(scales[r]), v_scale_1 = __half2float(scales[r + 8]);
    const uint b_0 = tq_transpose(tq_half_pair(p_0 * v_scale_0, p_1 * v_scale_0));
    const uint b_1 = tq_transpose(tq_half_pair(p_2 * v_scale_1, p_3 * v_scale_1));
    uint v_words[4][V_WORDS];
    const uchar* v_row = unit + K_UNIT + c * V_PITCH;
    tq_words<V_PART, V_BYTES>(v_row, r, v_words[0]);
    tq_words<V_PART, V_BYTES>(v_row + V_BYTES, r, v_words[1]);
    tq_words<V_PART, V_BYTES>(v_row + 4 * V_PITCH, r, v_words[2]);
    tq_words<V_PART, V_BYTES>(v_row + 4 * V_PITCH + V_BYTES, r, v_words[3]);
#pragma unroll
    for (int j = 0; j < DV / 64; j++) {  // eight dims: two registers of four products
      uint x[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint* w = v_words[i];
        const int word = 8 * VBITS * j >> 5, shift = 8 * VBITS * j & 31;
        x[i] = shift + 8 * VBITS > 32 ? __funnelshift_r(w[word], w[word + 1], shift) : w[word] >> shift;
      }
      const uint low_even = (x[0] & EVEN) | ((x[1] & EVEN) << VBITS);
      const uint low_odd = ((x[0] >> VBITS) & EVEN) | (x[1] & (EVEN << VBITS));
      const uint high_even = (x[2] & EVEN) | ((x[3] & EVEN) << VBITS);
      const uint high_odd = ((x[2] >> VBITS) & EVEN) | (x[3] & (EVEN << VBITS));
#pragma unroll
      for (int i = 0; i < 4; i++) {
        tq_mma(o[4 * j + i], tq_pair_at<2 * VBITS>(v_pairs, &low_even, 2 * VBITS * i, lane_4),
               tq_pair_at<2 * VBITS>(v_pairs, &low_odd, 2 * VBITS * i, lane_4),
               tq_pair_at<2 * VBITS>(v_pairs, &high_even, 2 * VBITS * i, lane_4),
               tq_pair_at<2 * VBITS>(v_pairs, &high_odd, 2 * VBITS * i, lane_4), b_0, b_1);
      }
    }
  }
}
tq_copies_wait<0>();
