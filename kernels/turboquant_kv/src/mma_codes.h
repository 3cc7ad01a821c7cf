// Compressed tokens on tensor cores: scores = K (16 tokens x 16 dims) . Q^T (16 dims x 8 rows), output = V^T (16 dims x
// 16 tokens) . P^T (16 tokens x 8 rows), so eight query rows share every unpacked code. Dims and tokens may be summed in
// any order: lane (r, c) reads a quarter of the keys of two tokens and an eighth of the values of four, contiguous in the
// canonical layout. A pair of codes indexes a table of half pairs, which is one register of an A fragment; value pairs are
// two tokens of one dim, interleaved by masks. Trellis codes become such pairs first (mma_trellis.h). Row i = r, r + 8 of unit u is token (r / 2) * BLOCK_TOKENS + 4u + r % 2,
// and two further: what lane column r / 2 holds of values.
#pragma once
#include "mma_queries.h"
#include "mma_ring.h"
#include "mma_tables.h"
#include "mma_trellis.h"

constexpr int K_PART = D * KBITS / 4;  // bits a lane reads
constexpr int V_PART = DV * VBITS / 8;
constexpr int K_WORDS = K_TRELLIS ? 2 * ((D / 4 + 15) / 16) : (K_PART + 31) / 32;
constexpr int V_WORDS = (V_PART + 31) / 32;
constexpr bool K_SIGNED = K_TRELLIS && KBITS == 4, V_SIGNED = V_TRELLIS && VBITS == 4;  // signs lie beside pairs
constexpr int K_CODE = K_TRELLIS ? 4 : KBITS;  // bits of a code where two of them are a pair
constexpr int V_CODE = V_TRELLIS ? 4 : VBITS;
constexpr uint K_MASK = K_TRELLIS && KBITS == 2 ? 0x77 : (1u << (2 * K_CODE)) - 1;  // bits that tell a pair
constexpr uint V_MASK = V_TRELLIS && VBITS == 2 ? 0x3f : (1u << (2 * V_CODE)) - 1;
constexpr uint EVEN = VBITS == 4 ? 0x0f0f0f0fu : VBITS == 3 ? 0x1c71c7u : 0x3333u;  // even ones of eight codes

// Tokens [low, limit) that the lane's two query rows, 2c and 2c + 1, see.
struct TqBounds {
  int low_0, low_1, limit_0, limit_1;
};
TQ_FN TqBounds tq_bounds(TqWork work, TqLane at, int end) {
  TqBounds bounds = {tq_low_of(work, 2 * at.c), tq_low_of(work, 2 * at.c + 1), end, end};
  if (QROWS > 1) {
    const int page_0 = max(0, tq_position_of(work, 2 * at.c) - SINK) / PAGE;
    const int page_1 = max(0, tq_position_of(work, 2 * at.c + 1) - SINK) / PAGE;
    bounds.limit_0 = min(end, min(work.figures.num_pages, page_0) * PAGE);
    bounds.limit_1 = min(end, min(work.figures.num_pages, page_1) * PAGE);
  }
  return bounds;
}

// The tables of half pairs, and the queries behind them; a whole block meets here. The first tiles are asked for as early
// as the arena allows: a dense rotation's scratch lies where the rings are.
TQ_FN void tq_prepare(TqPlace place, TqDecodeInputs inputs, TqWork work, TqRing& ring, uchar* arena, float* means) {
  if (tq_is_power_of_two(D)) tq_copy_first_tiles(ring, inputs, work.head, place.lane);
  const float k_centroid = tq_k_book_at(place.tid % (1 << (KBITS + K_TRELLIS)));
  const float v_centroid = tq_v_book_at(place.tid % (1 << (VBITS + V_TRELLIS)));
  if (K_TRELLIS) tq_fill_trellis_pairs<KBITS, true, PITCH, THREADS>(arena + K_TABLE, k_centroid, place.tid);
  else tq_fill_pairs<KBITS, PITCH, THREADS>(arena + K_TABLE, arena + K_HIGH_TABLE, k_centroid, place.tid);
  if (V_TRELLIS) {
    tq_fill_trellis_pairs<VBITS, false, PITCH, THREADS>(arena + V_TABLE, v_centroid, place.tid);
  } else if (V_TABLE != K_TABLE) {
    tq_fill_pairs<VBITS, PITCH, THREADS>(arena + V_TABLE, arena + V_HIGH_TABLE, v_centroid, place.tid);
  }
  if (TURN_PAIRS > 0) tq_turn_queries(place, inputs, work, arena);
  tq_rotate_queries(place, inputs, work, arena, means);
  if (!tq_is_power_of_two(D)) tq_copy_first_tiles(ring, inputs, work.head, place.lane);
  __syncthreads();
}

// The queries in the order in which a trellis' pairs of keys come.
TQ_FN void tq_order_queries(TqQueryFragments& queries) {
#pragma unroll
  for (int i = 0; i < D / 8; i += 2) {
    const uint first = queries.pairs[i], second = queries.pairs[i + 1];
    queries.pairs[i] = __byte_perm(first, second, 0x5410);
    queries.pairs[i + 1] = __byte_perm(first, second, 0x7632);
  }
}

// The scales of a tile's tokens that are rows r and r + 8 of unit u: at 4u and 4u + 2; values' TILE further.
TQ_FN const __half* tq_scales(const uchar* tile, TqLane at) {
  return reinterpret_cast<const __half*>(tile + SCALES_AT) + (at.r >> 1) * BLOCK_TOKENS + (at.r & 1);
}

// Scores s of unit u, capped: tokens r and r + 8 by query rows 2c and 2c + 1. t0: the tile's first token.
TQ_FN void tq_score_unit(const uchar* tile, const uchar* arena, const TqQueryFragments& queries, const float* means, TqBounds bounds, float cap,
                         TqLane at, uint lane_4, int t0, int u, float* s) {
  const uint row = (at.r >> 1) * BLOCK_TOKENS + 4 * u + (at.r & 1);
  uint words[2][K_WORDS + 1], signs[(D / 4 + 15) / 16];
  if (K_TRELLIS) {
    tq_trellis_keys<D / 4, D, KBITS>(tile, row, row + 2, at, words[0], words[1], signs);
  } else {
    tq_bits<K_PART, K_BYTES>(tile, row, at.c, words[0]);
    tq_bits<K_PART, K_BYTES>(tile, row + 2, at.c, words[1]);
  }
  uint later[2][K_WORDS];
  tq_later_words<K_CODE, PITCH, K_WORDS>(words[0], later[0]);
  tq_later_words<K_CODE, PITCH, K_WORDS>(words[1], later[1]);
  auto key_pair = [&](int row, int n) {
    const int pair = K_TRELLIS ? tq_trellis_byte(n) : n;
    const uint x =
        tq_pair_at<K_CODE, PITCH, K_MASK>(arena + K_TABLE, arena + K_HIGH_TABLE, words[row], later[row], pair, lane_4);
    return K_SIGNED ? tq_signed(x, signs[n / 8], 2 * (n % 8) + row) : x;
  };
  float even[4] = {0.0f, 0.0f, 0.0f, 0.0f}, odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    tq_mma(i % 2 ? odd : even, key_pair(0, 2 * i), key_pair(1, 2 * i), key_pair(0, 2 * i + 1), key_pair(1, 2 * i + 1),
           queries.pairs[2 * i], queries.pairs[2 * i + 1]);
  }
  const __half* scales = tq_scales(tile, at);
  const float scale_0 = __half2float(scales[4 * u]), scale_1 = __half2float(scales[4 * u + 2]);
  s[0] = (even[0] + odd[0]) * scale_0 + means[0];
  s[1] = (even[1] + odd[1]) * scale_0 + means[1];
  s[2] = (even[2] + odd[2]) * scale_1 + means[0];
  s[3] = (even[3] + odd[3]) * scale_1 + means[1];
  if (CAPPED) {
#pragma unroll
    for (int i = 0; i < 4; i++) s[i] = tq_capped(s[i], cap);
  }
  if (QROWS > 1 || bounds.low_1 > t0) {
    const int token = t0 + int(row);
    if (token >= bounds.limit_0 || token < bounds.low_0) s[0] = TQ_MASKED;
    if (token >= bounds.limit_1 || token < bounds.low_1) s[1] = TQ_MASKED;
    if (token + 2 >= bounds.limit_0 || token + 2 < bounds.low_0) s[2] = TQ_MASKED;
    if (token + 2 >= bounds.limit_1 || token + 2 < bounds.low_1) s[3] = TQ_MASKED;
  }
}

// Eight dims of four tokens' values, from code 8j of the lane's words on, to registers of four pairs: even and odd dims of
// the first two tokens, then of the other two.
TQ_FN void tq_value_pairs(const uint (*words)[V_WORDS + 1], int j, uint* pairs) {
  uint x[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint* w = words[i];
    const int word = 8 * VBITS * j >> 5, shift = 8 * VBITS * j & 31;
    x[i] = shift + 8 * VBITS > 32 ? __funnelshift_r(w[word], w[word + 1], shift) : w[word] >> shift;
  }
  pairs[0] = (x[0] & EVEN) | ((x[1] & EVEN) << VBITS);
  pairs[1] = ((x[0] >> VBITS) & EVEN) | (x[1] & (EVEN << VBITS));
  pairs[2] = (x[2] & EVEN) | ((x[3] & EVEN) << VBITS);
  pairs[3] = ((x[2] >> VBITS) & EVEN) | (x[3] & (EVEN << VBITS));
}

// Adds four tokens' values, from row `token` of `rows_of` on, with weights b.
TQ_FN void tq_add_trellis(const uchar* rows_of, uint token, const uchar* arena, TqLane at, uint lane_4, uint b_0, uint b_1,
                          TqMmaRows& rows) {
  uint words[2][4 * ((DV / 8 + 15) / 16)], signs[2][(DV / 8 + 15) / 16];  // of two tokens each
#pragma unroll
  for (int i = 0; i < 2; i++) tq_trellis_values<DV / 8, DV, VBITS>(rows_of, token + 2 * i, at, words[i], signs[i]);
  auto value_pair = [&](int i, int d) {
    const uint* w = words[i] + (d / 16 * 4 + d % 4);
    const uint x = tq_pair_at<V_CODE, PITCH, V_MASK>(arena + V_TABLE, arena + V_HIGH_TABLE, w, w, d / 4 % 4, lane_4);
    return V_SIGNED ? tq_signed(x, signs[i][d / 16], tq_value_sign_bit(d % 16)) : x;
  };
#pragma unroll
  for (int i = 0; i < DV / 16; i++) {
    tq_mma(rows.o[i], value_pair(0, 2 * i), value_pair(0, 2 * i + 1), value_pair(1, 2 * i), value_pair(1, 2 * i + 1), b_0,
           b_1);
  }
}

// Adds unit u's values, with weights p where tq_score_unit has scores.
TQ_FN void tq_add_unit(const uchar* tile, const uchar* arena, TqLane at, uint lane_4, int u, const float* p, TqMmaRows& rows) {
  const __half* scales = tq_scales(tile, at) + TILE;
  const float scale_0 = __half2float(scales[4 * u]), scale_1 = __half2float(scales[4 * u + 2]);
  const uint b_0 = tq_transpose(tq_half_pair(p[0] * scale_0, p[1] * scale_0));
  const uint b_1 = tq_transpose(tq_half_pair(p[2] * scale_1, p[3] * scale_1));
  if (V_TRELLIS) {
    tq_add_trellis(tile + V_AT + at.c * V_BLOCK_BYTES, 4 * u, arena, at, lane_4, b_0, b_1, rows);
    return;
  }
  uint words[4][V_WORDS + 1];
#pragma unroll
  for (int i = 0; i < 4; i++) tq_bits<V_PART, V_BYTES>(tile + V_AT + at.c * V_BLOCK_BYTES, 4 * u + i, at.r, words[i]);
#pragma unroll
  for (int j = 0; j < (DV + 63) / 64; j++) {  // eight dims: two registers of four products
    uint pairs[4], later[4];
    tq_value_pairs(words, j, pairs);
#pragma unroll
    for (int i = 0; i < 4; i++) tq_later_words<VBITS, PITCH, 1>(pairs + i, later + i);
    auto value_pair = [&](int i, int n) {
      return tq_pair_at<VBITS, PITCH>(arena + V_TABLE, arena + V_HIGH_TABLE, pairs + i, later + i, n, lane_4);
    };
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (4 * j + i >= DV / 16) break;
      tq_mma(rows.o[4 * j + i], value_pair(0, i), value_pair(1, i), value_pair(2, i), value_pair(3, i), b_0, b_1);
    }
  }
}

// A block's run of compressed tokens; returns how many warps have something to add.
TQ_FN int tq_attend_codes(TqPlace place, TqDecodeInputs inputs, TqWork work, uchar* arena, TqMmaShared& shared,
                          TqMmaRows& rows) {
  TqRing ring = tq_ring(place, inputs, work, arena, shared.barriers + int(place.warp) * (BULK ? STAGES : 0));
  tq_prepare(place, inputs, work, ring, arena, shared.mean);
  const TqLane at = tq_lane(place);
  TqQueryFragments queries = tq_query_fragments(at, tq_shared_queries(arena), shared.mean);
  if (K_TRELLIS) tq_order_queries(queries);
  const TqBounds bounds = tq_bounds(work, at, ring.end);
  const uint lane_4 = 4 * place.lane;
  float means[2] = {queries.mean_0, queries.mean_1};
  TqTurning turning;
  if (TURN_PAIRS > 0) turning = tq_start_turning(inputs, arena, at, ring.begin, RING_STEP, ring.end);
  // Two loops, because a branch inside costs every tile a fifth more instructions; without turning the outer has one round.
  for (int t0 = ring.begin; t0 < ring.end;) {
    int group_end = ring.end;
    if (TURN_PAIRS > 0) {
      tq_next_turned_group(turning, inputs, at, t0, RING_STEP, ring.end);
      group_end = min(ring.end, t0 + TURN_TILES * RING_STEP);
    }
    for (; t0 < group_end; t0 += RING_STEP) {
      TqTurnAngles angles[TURN_PAIRS > 0 ? TURN_AT_ONCE : 1];
      if (TURN_PAIRS > 0) {
        tq_turned_means(turning, at, queries.mean_0, queries.mean_1, means);
#pragma unroll
        for (int k = 0; k < TURN_AT_ONCE; k++) {
          angles[k] = tq_ask_angles(turning, min(tq_first_turn_step(turning) + k, TURN_STEPS - 1));
        }
      }
      const uchar* tile = tq_next_tile(ring);
      tq_copy_tile(ring, inputs, work.head, place.lane);
      float s[UNITS][4];
      float peak_0 = rows.peak[0], peak_1 = rows.peak[1];
#pragma unroll
      for (int u = 0; u < UNITS; u++) {
        tq_score_unit(tile, arena, queries, means, bounds, work.step.cap, at, lane_4, t0, u, s[u]);
        peak_0 = fmaxf(peak_0, fmaxf(s[u][0], s[u][2]));
        peak_1 = fmaxf(peak_1, fmaxf(s[u][1], s[u][3]));
      }
      tq_raise(rows, peak_0, peak_1);
#pragma unroll
      for (int u = 0; u < UNITS; u++) {
        tq_weigh(rows, s[u]);
        tq_add_unit(tile, arena, at, lane_4, u, s[u], rows);
      }
      if (TURN_PAIRS > 0) {
#pragma unroll
        for (int k = 0; k < TURN_AT_ONCE; k++) {
          const int i = tq_first_turn_step(turning) + k;
          if (TURN_STEPS % TURN_TILES == 0 || i < tq_last_turn_step(turning)) tq_turn_step(turning, angles[k], i);
        }
        turning.tile++;
      }
    }
  }
  if (!BULK) tq_copies_wait<0>();
  return min(WARPS, (ring.end - work.first_tile * 32 + TILE - 1) / TILE);
}
