// Decode attention on Metal's 8x8 matrices: the portable kernel's plan, queries, exact rows and parts; only compressed
// tokens are another walk. Exact rows stay portable: they are at most a sink and a page, in a block of their own.
#pragma once
#include "decode_block.h"
#include "matrices_metal.h"

typedef vec<Piece, 2> Pair;
// Scores of a simdgroup, 8 rows FLIP_PITCH floats apart: a multiple of four, for wide accesses, that is none of 32, so
// that rows begin in different banks.
TQ_CONSTANT int FLIP_PITCH = 36;
TQ_CONSTANT int FLIP_FLOATS = 8 * FLIP_PITCH;
TQ_CONSTANT int K_PART = 2 * K_BYTES;  // bits of a quarter of a vector
TQ_CONSTANT int V_PART = 2 * V_BYTES;
// Words that hold one, or its nibbles.
TQ_CONSTANT int K_WORDS = K_TRELLIS != 0 ? (D + 63) / 64 * tq_words_of_16(KBITS) : (K_PART + 31) / 32;
TQ_CONSTANT int V_WORDS = V_TRELLIS != 0 ? (DV + 63) / 64 * tq_words_of_16(VBITS) : (V_PART + 31) / 32;
TQ_CONSTANT int SAME_PAIRS = KBITS == VBITS && K_TRELLIS == V_TRELLIS ? 1 : 0;
TQ_CONSTANT int AT_ONCE = K_BYTES <= 64 ? 4 : 2;  // tokens whose keys wait in registers

// Pairs of centroids by pairs of codes, single ones of 8 bits. The queries' memory is used again for scores, and the
// merge's for the queries as matrices.
struct TqSimdShared {
  alignas(16) float q[tq_larger(ROWS * D, WARPS * FLIP_FLOATS)];
  TqBlockRows rows;
  Pair k_pairs[tq_num_pairs(KBITS, K_TRELLIS)];
  Pair own_v_pairs[SAME_PAIRS != 0 ? 1 : tq_num_pairs(VBITS, V_TRELLIS)];
};

// A lane's row of output and its running softmax; masses are sums over the row's four lanes.
struct TqMatrixRow {
  float peak, mass;
  simdgroup_matrix<float, 8, 8> o[DV / 8];
};

// Scores or weights of tokens 8c ... 8c + 7 of row r.
struct TqEight {
  float4 at[2];
};

template <int BITS, int IS_TRELLIS>
TQ_FN Pair tq_pair_entry(const constant float* book, int i) {
  const int LEVEL = BITS == 2 ? 7 : 15;  // bits of a nibble that tell a level, of 4 bits without its sign
  if (IS_TRELLIS) return tq_two(Piece(book[i & LEVEL]), Piece(book[i >> 4 & LEVEL]));
  return tq_two(Piece(book[i & ((1 << BITS) - 1)]), Piece(book[i >> (BITS & 7)]));
}
TQ_FN void tq_fill_pairs(TqPlace place, TQ_SHARED TqSimdShared& shared) {
  for (int i = int(place.tid); i < tq_num_pairs(KBITS, K_TRELLIS); i += THREADS) {
    shared.k_pairs[i] = tq_pair_entry<KBITS, K_TRELLIS>(tq_k_book, i);
  }
  if (SAME_PAIRS) return;
  for (int i = int(place.tid); i < tq_num_pairs(VBITS, V_TRELLIS); i += THREADS) {
    shared.own_v_pairs[i] = tq_pair_entry<VBITS, V_TRELLIS>(tq_v_book, i);
  }
}

// The queries as matrices Q^T of 8 dims x 8 rows, as each lane takes them, where nothing else lies until the merge: row k
// of matrix i is dim k % 2 of pair i of quarter k / 2, what lane column k / 2 holds of keys.
TQ_FN TQ_SHARED Pair* tq_query_pairs(TQ_SHARED TqBlockRows& rows) {
  return reinterpret_cast<TQ_SHARED Pair*>(rows.work);
}
TQ_FN void tq_lay_out_queries(TqPlace place, TQ_SHARED TqSimdShared& shared) {
  const int r = tq_lane_row(place.lane), c = tq_lane_column(place.lane);
  for (int i = int(place.warp); i < D / 8; i += WARPS) {
    const int d = r / 2 * (D / 4) + tq_first_dim<K_TRELLIS>(i) + r % 2 * tq_dim_step<K_TRELLIS>();
    tq_query_pairs(shared.rows)[32 * i + int(place.lane)] =
        tq_two(Piece(shared.q[2 * c * D + d]), Piece(shared.q[(2 * c + 1) * D + d]));
  }
  TQ_BARRIER();
}

// Scores of tokens row_id ... row_id + 3, before scales: K (8 tokens x 8 dims) . Q^T. Matrix u has them of token 4j + u
// in row j.
TQ_FN void tq_score_tile(TqPlace place, const TQ_DEVICE uchar* k_codes, uint row_id, TQ_SHARED TqSimdShared& shared,
                         TQ_THREAD simdgroup_matrix<float, 8, 8>* s) {
#pragma unroll
  for (int u = 0; u < 4; u++) tq_elements(s[u]) = float2(0.0f);
#pragma unroll
  for (int first = 0; first < 4; first += AT_ONCE) {
    uint words[AT_ONCE][K_WORDS];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      const TQ_DEVICE uchar* key = k_codes + ulong(row_id + first + u) * K_BYTES;
      if (K_TRELLIS) tq_trellis_quarter<D, KBITS>(key, tq_lane_column(place.lane), words[u]);
      else tq_quarter<K_PART>(key, tq_lane_column(place.lane), words[u]);
    }
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      simdgroup_matrix<Piece, 8, 8> q, k;
      tq_elements(q) = tq_query_pairs(shared.rows)[32 * i + int(place.lane)];
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++) {
        tq_elements(k) = tq_pair_of_quarter<KBITS, K_TRELLIS>(shared.k_pairs, words[u], i);
        simdgroup_multiply_accumulate(s[first + u], k, q, s[first + u]);
      }
    }
  }
}

// Scores transposed through threadgroup memory: before, a lane has two rows' of four tokens, afterwards one row's of
// eight.
TQ_FN TqEight tq_flip(TQ_THREAD simdgroup_matrix<float, 8, 8>* s, TQ_SHARED float* flip, int r, int c) {
  TQ_SHARED float4* to = reinterpret_cast<TQ_SHARED float4*>(flip + 2 * c * FLIP_PITCH + 4 * r);
  to[0] = float4(tq_elements(s[0]).x, tq_elements(s[1]).x, tq_elements(s[2]).x, tq_elements(s[3]).x);
  to[FLIP_PITCH / 4] = float4(tq_elements(s[0]).y, tq_elements(s[1]).y, tq_elements(s[2]).y, tq_elements(s[3]).y);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  const TQ_SHARED float4* from = reinterpret_cast<const TQ_SHARED float4*>(flip + r * FLIP_PITCH + 8 * c);
  const TqEight p = {{from[0], from[1]}};
  simdgroup_barrier(mem_flags::mem_threadgroup);  // all have read before the next tile's scores
  return p;
}

// Scores scaled and capped; those of tokens outside [low, limit) masked. first: of the lane's eight tokens.
TQ_FN void tq_scale_scores(TQ_THREAD TqEight& p, const TQ_DEVICE Half* scales, float mean, float cap, int tile, int first,
                           int low, int limit) {
  const TQ_DEVICE half4* k_scale = reinterpret_cast<const TQ_DEVICE half4*>(scales);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    p.at[i] = p.at[i] * float4(k_scale[i]) + mean;
    if (CAPPED) {
#pragma unroll
      for (int u = 0; u < 4; u++) p.at[i][u] = tq_capped(p.at[i][u], cap);
    }
    if (tile * 32 + 32 > limit || tile * 32 < low) {
#pragma unroll
      for (int u = 0; u < 4; u++) {
        const int token = first + 4 * i + u;
        if (token >= limit || token < low) p.at[i][u] = TQ_MASKED;
      }
    }
  }
}

// Scores to weights times the values' scales. Totals fade only in tiles where a peak rises.
TQ_FN void tq_weigh_tile(TQ_THREAD TqMatrixRow& row, TQ_THREAD TqEight& p, const TQ_DEVICE Half* scales) {
  const float4 top = max(p.at[0], p.at[1]);
  float new_peak = tq_max(row.peak, tq_max(tq_max(top.x, top.y), tq_max(top.z, top.w)));
  new_peak = tq_max(new_peak, tq_shuffle_xor(new_peak, 1));
  new_peak = tq_max(new_peak, tq_shuffle_xor(new_peak, 8));
  if (simd_any(new_peak > row.peak)) {
    const float fade = tq_exp2(row.peak - new_peak);
    row.peak = new_peak;
    row.mass *= fade;
#pragma unroll
    for (int i = 0; i < DV / 8; i++) tq_elements(row.o[i]) *= fade;
  }
  const TQ_DEVICE half4* v_scale = reinterpret_cast<const TQ_DEVICE half4*>(scales);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    p.at[i] = exp2(p.at[i] - row.peak);
    row.mass += p.at[i].x + p.at[i].y + p.at[i].z + p.at[i].w;
    p.at[i] *= float4(v_scale[i]);
  }
}

// Output += P (8 rows x 8 tokens) . V (8 tokens x 8 dims), of tokens row_id ... row_id + 3; token 4j + u is column j of
// matrix u.
TQ_FN void tq_add_values(TqPlace place, const TQ_DEVICE uchar* v_codes, uint row_id, TqEight p,
                         TQ_SHARED TqSimdShared& shared, TQ_THREAD TqMatrixRow& row) {
  const TQ_SHARED Pair* v_pairs = SAME_PAIRS ? shared.k_pairs : shared.own_v_pairs;
#pragma unroll
  for (int u = 0; u < 4; u++) {
    uint words[V_WORDS];
    const TQ_DEVICE uchar* value = v_codes + ulong(row_id + u) * V_BYTES;
    if (V_TRELLIS) tq_trellis_quarter<DV, VBITS>(value, tq_lane_column(place.lane), words);
    else tq_quarter<V_PART>(value, tq_lane_column(place.lane), words);
    simdgroup_matrix<Piece, 8, 8> weights, v;
    tq_elements(weights) = tq_two(Piece(p.at[0][u]), Piece(p.at[1][u]));
#pragma unroll
    for (int i = 0; i < DV / 8; i++) {
      tq_elements(v) = tq_pair_of_quarter<VBITS, V_TRELLIS>(v_pairs, words, i);
      simdgroup_multiply_accumulate(row.o[i], weights, v, row.o[i]);
    }
  }
}

// A run of compressed tokens, tiles of 32 to the simdgroups in turn. In both products a lane holds two neighbouring dims of a
// token, which is one entry of the table of pairs. Dims and tokens may be summed in any order: lane (r, c) reads quarter c
// of the keys and values of tokens 4r ... 4r + 3.
TQ_FN void tq_attend_tiles(TqPlace place, TqDecodeInputs inputs, TqWork work, TQ_SHARED TqSimdShared& shared,
                           TQ_THREAD TqMatrixRow& row) {
  const int r = tq_lane_row(place.lane), c = tq_lane_column(place.lane);
  const int low = tq_low_of(work, r), limit = tq_limit_of(work, r);
  TQ_SHARED float* flip = shared.q + int(place.warp) * FLIP_FLOATS;
  const TQ_DEVICE int* pages = inputs.page_table + work.sequence * work.step.table_width;
  for (int tile = work.first_tile + int(place.warp); tile < work.last_tile; tile += WARPS) {
    // The last tile may have but 16 tokens: what is masked there reads the first ones again.
    const int mine = tile * 32 + 4 * r < work.num_tokens ? tile * 32 + 4 * r : 0;
    const int scored = tile * 32 + 8 * c < work.num_tokens ? tile * 32 + 8 * c : 0;
    const uint row_id = uint((pages[mine / PAGE] * HEADS + work.head) * PAGE + mine % PAGE);
    const uint scored_id = uint((pages[scored / PAGE] * HEADS + work.head) * PAGE + scored % PAGE);
    simdgroup_matrix<float, 8, 8> s[4];
    tq_score_tile(place, inputs.k_codes, row_id, shared, s);
    TqEight p = tq_flip(s, flip, r, c);
    float mean = shared.rows.mean[r];
    if (TURN_PAIRS > 0) mean = tq_shuffle(tq_mean_scores(place, shared.rows, inputs.turns, tile), uint(2 * r + c / 2));
    tq_scale_scores(p, inputs.k_scales + scored_id, mean, work.step.cap, tile, tile * 32 + 8 * c, low, limit);
    tq_weigh_tile(row, p, inputs.v_scales + scored_id);
    tq_add_values(place, inputs.v_codes, row_id, p, shared, row);
  }
}

// The simdgroups' softmaxes become one, as in decode_block.h, from the matrices that each holds.
TQ_FN void tq_merge_matrices(TqPlace place, TQ_THREAD TqMatrixRow& row, TQ_SHARED TqBlockRows& rows) {
  const int r = tq_lane_row(place.lane), c = tq_lane_column(place.lane);
  float mass = row.mass;
  mass += tq_shuffle_xor(mass, 1);
  mass += tq_shuffle_xor(mass, 8);
  if (c == 0) {
    rows.peak[int(place.warp) * ROWS + r] = row.peak;
    rows.mass[int(place.warp) * ROWS + r] = mass;
  }
  TQ_BARRIER();
  const float weight = tq_exp2(row.peak - tq_top_of(rows, r));
  for (int w = 0; w < WARPS; w++) {
    if (int(place.warp) == w && r < LIVE) {
      TQ_SHARED float* sums = rows.work + r * DV + c * (DV / 4);
#pragma unroll
      for (int i = 0; i < DV / 8; i++) {
        const float2 x = tq_elements(row.o[i]) * weight;
        TQ_SHARED float* first = sums + tq_first_dim<V_TRELLIS>(i);
        TQ_SHARED float* second = first + tq_dim_step<V_TRELLIS>();
        *first = x.x + (w > 0 ? *first : 0.0f);
        *second = x.y + (w > 0 ? *second : 0.0f);
      }
    }
    TQ_BARRIER();
  }
}

// The exact rows of a block, and its run of codes: each to the merged rows in shared.rows.
TQ_FN void tq_exact_block(TqPlace place, TqWork work, TqExactRows exact, TQ_SHARED TqSimdShared& shared) {
  TqRunning running;
  tq_start(running);
  tq_attend_exact(place, work, exact, shared.q, running);
  tq_merge_warps(place, running, shared.rows);
}
TQ_FN void tq_codes_block(TqPlace place, TqDecodeInputs inputs, TqWork work, TQ_SHARED TqSimdShared& shared) {
  tq_rotate_queries(place, inputs.k_constants, work.head, shared.q, shared.rows);
  tq_lay_out_queries(place, shared);
  TqMatrixRow row;
  row.peak = TQ_NO_PEAK;
  row.mass = 0.0f;
#pragma unroll
  for (int i = 0; i < DV / 8; i++) tq_elements(row.o[i]) = float2(0.0f);
  tq_attend_tiles(place, inputs, work, shared, row);
  tq_merge_matrices(place, row, shared.rows);
}

TQ_FN void tq_decode_simd(TqPlace place, TqDecodeInputs inputs, TqExactRows exact, TqNewRows given, TQ_DEVICE float* parts,
                          TQ_SHARED TqSimdShared& shared) {
  const TqWork work = tq_work(place, inputs.plan);
  if (!tq_has_work(place, work)) return;
  tq_fill_pairs(place, shared);
  tq_load_queries(place, inputs, work, shared.q);
  if (APPENDS && place.block_x == 0) tq_append(place, inputs, work, exact, given, THREADS);
  if (place.block_x == 0) tq_exact_block(place, work, exact, shared);
  else tq_codes_block(place, inputs, work, shared);
  tq_write_part(place, work, shared.rows, parts);
}
