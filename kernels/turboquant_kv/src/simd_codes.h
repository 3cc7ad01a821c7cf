// Compressed tokens on 8x8 matrices, tiles of 32 to the simdgroups in turn: scores = K (8 tokens x 8 dims) . Q^T (8 dims x
// 8 rows), output += P (8 rows x 8 tokens) . V (8 tokens x 8 dims). Both ways a lane holds two neighbouring dims of a
// token, which is one entry of the table of pairs. Dims and tokens may be summed in any order: lane (r, c) reads quarter c
// of the keys and values of tokens 4r ... 4r + 3, and matrix u has token 4j + u in its row or column j. Between the two
// products scores are transposed through threadgroup memory, after which a lane has tokens 8c ... 8c + 7 of row r.
const int K_BYTES = D * KBITS / 8;
const int V_BYTES = DV * VBITS / 8;
const int K_PART = 2 * K_BYTES;  // bits of a quarter
const int V_PART = 2 * V_BYTES;
const int AT_ONCE = K_BYTES <= 64 ? 4 : 2;  // tokens whose keys wait in registers
TQ_SHARED float* flip = shared_q + int(warp) * (8 * FLIP_PITCH);
for (int tile = first_tile + int(warp); tile < last_tile; tile += WARPS) {
  // The last tile may have but 16 tokens: what is masked there reads the first ones again.
  const int mine = tile * 32 + 4 * r < num_tokens ? tile * 32 + 4 * r : 0;
  const int scored = tile * 32 + 8 * c < num_tokens ? tile * 32 + 8 * c : 0;
  const TQ_DEVICE int* pages = page_table + sequence * plan[1];
  const uint row_id = uint((pages[mine / PAGE] * HEADS + head) * PAGE + mine % PAGE);
  const uint scored_id = uint((pages[scored / PAGE] * HEADS + head) * PAGE + scored % PAGE);

  simdgroup_matrix<float, 8, 8> s[4];
#pragma unroll
  for (int u = 0; u < 4; u++) tq_elements(s[u]) = float2(0.0f);
#pragma unroll
  for (int first = 0; first < 4; first += AT_ONCE) {
    uint words[AT_ONCE][(K_PART + 31) / 32];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      tq_quarter<K_PART>(k_codes + ulong(row_id + first + u) * K_BYTES, c, words[u]);
    }
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      simdgroup_matrix<Piece, 8, 8> q, k;
      tq_elements(q) = q_pairs[32 * i + int(lane)];
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++) {
        tq_elements(k) = tq_pair_of<KBITS>(k_pairs, words[u], i);
        simdgroup_multiply_accumulate(s[first + u], k, q, s[first + u]);
      }
    }
  }

  TQ_SHARED float4* to = reinterpret_cast<TQ_SHARED float4*>(flip + 2 * c * FLIP_PITCH + 4 * r);
  to[0] = float4(tq_elements(s[0]).x, tq_elements(s[1]).x, tq_elements(s[2]).x, tq_elements(s[3]).x);
  to[FLIP_PITCH / 4] = float4(tq_elements(s[0]).y, tq_elements(s[1]).y, tq_elements(s[2]).y, tq_elements(s[3]).y);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  const TQ_SHARED float4* from = reinterpret_cast<const TQ_SHARED float4*>(flip + r * FLIP_PITCH + 8 * c);
  float4 p[2] = {from[0], from[1]};
  simdgroup_barrier(mem_flags::mem_threadgroup);  // all have read before the next tile's scores

  const TQ_DEVICE half4* k_scale = reinterpret_cast<const TQ_DEVICE half4*>(k_scales + scored_id);
  const TQ_DEVICE half4* v_scale = reinterpret_cast<const TQ_DEVICE half4*>(v_scales + scored_id);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    p[i] = p[i] * float4(k_scale[i]) + mean;
    if (tile * 32 + 32 > limit || tile * 32 < low) {
#pragma unroll
      for (int u = 0; u < 4; u++) {
        const int token = tile * 32 + 8 * c + 4 * i + u;
        if (token >= limit || token < low) p[i][u] = TQ_MASKED;
      }
    }
  }
  const float4 top = max(p[0], p[1]);
  float new_peak = tq_max(peak, tq_max(tq_max(top.x, top.y), tq_max(top.z, top.w)));
  new_peak = tq_max(new_peak, tq_shuffle_xor(new_peak, 1));
  new_peak = tq_max(new_peak, tq_shuffle_xor(new_peak, 8));
  if (simd_any(new_peak > peak)) {
    const float fade = tq_exp2(peak - new_peak);
    peak = new_peak;
    mass *= fade;
#pragma unroll
    for (int i = 0; i < DV / 8; i++) tq_elements(o[i]) *= fade;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    p[i] = exp2(p[i] - peak);
    mass += p[i].x + p[i].y + p[i].z + p[i].w;
    p[i] *= float4(v_scale[i]);
  }
#pragma unroll
  for (int u = 0; u < 4; u++) {
    uint words[(V_PART + 31) / 32];
    tq_quarter<V_PART>(v_codes + ulong(row_id + u) * V_BYTES, c, words);
    simdgroup_matrix<Piece, 8, 8> weights, v;
    tq_elements(weights) = tq_two(Piece(p[0][u]), Piece(p[1][u]));
#pragma unroll
    for (int i = 0; i < DV / 8; i++) {
      tq_elements(v) = tq_pair_of<VBITS>(v_pairs, words, i);
      simdgroup_multiply_accumulate(o[i], weights, v, o[i]);
    }
  }
}
