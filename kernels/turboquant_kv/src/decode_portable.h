// Decode attention without matrices, for every shape and both vendors: a block's query rows over exact rows or a run of
// compressed tokens, to an unnormalised part.
#pragma once
#include "codes.h"
#include "decode_block.h"

struct TqPortableShared {
  float q[ROWS * D];
  TqBlockRows rows;
  float k_table[K_LEVELS], v_table[V_LEVELS];  // centroids
};

TQ_FN void tq_fill_tables(TqPlace place, TQ_SHARED TqPortableShared& shared) {
  for (int i = int(place.tid); i < K_LEVELS; i += THREADS) shared.k_table[i] = tq_k_book[i];
  for (int i = int(place.tid); i < V_LEVELS; i += THREADS) shared.v_table[i] = tq_v_book[i];
}

// Centroids of a key's eight dims from 8 * unit on, and of a value's dims d and d + 1 (d even).
TQ_FN void tq_key_unit(const TQ_DEVICE uchar* key, int unit, const TQ_SHARED float* table, TQ_THREAD float* out) {
  if (K_TRELLIS) {
    const TqTrellisUnit coded = tq_trellis_unit<D, KBITS>(key, unit);
    for (int i = 0; i < 8; i++) out[i] = table[tq_trellis_level(coded, i)];
  } else {
    tq_unit<KBITS>(key + unit * KBITS, table, out);
  }
}
TQ_FN void tq_value_pair(const TQ_DEVICE uchar* value, uint d, const TQ_SHARED float* table, TQ_THREAD float* out) {
  if (V_TRELLIS) {
    const TqTrellisUnit coded = tq_trellis_unit<DV, VBITS>(value, int(d / 8));
    for (int i = 0; i < 2; i++) out[i] = table[tq_trellis_level(coded, int(d % 8) + i)];
  } else {
    tq_pair<VBITS>(value, d, table, out);
  }
}

// Row of the (pages, heads, page tokens) rows of the storage in which a token of the sequence lies.
TQ_FN uint tq_storage_row(TqDecodeInputs inputs, TqWork work, int token) {
  const int page_id = inputs.page_table[work.sequence * work.step.table_width + token / PAGE];
  return uint((page_id * HEADS + work.head) * PAGE + token % PAGE);
}

// A run of compressed tokens: tiles of 32 go to the warps in turn. Scores: a token a lane, so nothing is summed across
// lanes. Values: a pair of dims a lane, weights by shuffle.
TQ_FN void tq_attend_codes(TqPlace place, TqDecodeInputs inputs, TqWork work, const TQ_SHARED TqPortableShared& shared,
                           TQ_THREAD TqRunning& running) {
  const TQ_SHARED float* k_table = shared.k_table;
  const TQ_SHARED float* v_table = shared.v_table;
  int limits[LIVE], lows[LIVE];
  for (int r = 0; r < LIVE; r++) {
    limits[r] = tq_limit_of(work, r);
    lows[r] = tq_low_of(work, r);
  }
  for (int tile = work.first_tile + int(place.warp); tile < work.last_tile; tile += WARPS) {
    const int token = tile * 32 + int(place.lane);
    uint row_id = 0;
    float score[LIVE];
    for (int r = 0; r < LIVE; r++) score[r] = 0.0f;
    if (token < work.num_tokens) {
      row_id = tq_storage_row(inputs, work, token);
      const TQ_DEVICE uchar* vector = inputs.k_codes + ulong(row_id) * K_BYTES;
      for (int u = 0; u < D / 8; u++) {
        float c[8];
        tq_key_unit(vector, u, k_table, c);
        for (int r = 0; r < LIVE; r++) {
          for (int i = 0; i < 8; i++) score[r] += shared.q[r * D + u * 8 + i] * c[i];
        }
      }
    }
    const float k_scale = token < work.num_tokens ? float(inputs.k_scales[row_id]) : 0.0f;
    const float v_scale = token < work.num_tokens ? float(inputs.v_scales[row_id]) : 0.0f;
    const float turned = TURN_PAIRS > 0 ? tq_mean_scores(place, shared.rows, inputs.turns, tile) : 0.0f;
    for (int r = 0; r < LIVE; r++) {
      const bool seen = token < limits[r] && token >= lows[r];
      const float mean = TURN_PAIRS > 0 ? tq_shuffle(turned, uint(2 * r) + place.lane / 16) : shared.rows.mean[r];
      float scaled = score[r] * k_scale + mean;
      if (CAPPED) scaled = tq_capped(scaled, work.step.cap);
      score[r] = tq_weigh_row(running, r, seen ? scaled : TQ_MASKED) * v_scale;
    }
    const int count = work.num_tokens - tile * 32 < 32 ? work.num_tokens - tile * 32 : 32;
#pragma unroll 4
    for (int t = 0; t < count; t++) {
      const TQ_DEVICE uchar* vector = inputs.v_codes + ulong(tq_shuffle(row_id, uint(t))) * V_BYTES;
      float weight[LIVE];
      for (int r = 0; r < LIVE; r++) weight[r] = tq_shuffle(score[r], uint(t));
      for (int i = 0; i < PAIRS; i++) {
        const uint d = uint(tq_dim_of(place.lane, 2 * i));
        if (d < DV) {
          float c[2];
          tq_value_pair(vector, d, v_table, c);
          for (int r = 0; r < LIVE; r++) {
            running.total[r][2 * i] += weight[r] * c[0];
            running.total[r][2 * i + 1] += weight[r] * c[1];
          }
        }
      }
    }
  }
}

TQ_FN void tq_decode_portable(TqPlace place, TqDecodeInputs inputs, TqExactRows exact, TqNewRows given,
                              TQ_DEVICE float* parts, TQ_SHARED TqPortableShared& shared) {
  const TqWork work = tq_work(place, inputs.plan);
  if (!tq_has_work(place, work)) return;
  tq_fill_tables(place, shared);
  tq_load_queries(place, inputs, work, shared.q);
  TqRunning running;
  tq_start(running);
  if (place.block_x == 0) {
    if (APPENDS) tq_append(place, inputs, work, exact, given, THREADS);
    tq_attend_exact(place, work, exact, shared.q, running);
  } else {
    tq_rotate_queries(place, inputs.k_constants, work.head, shared.q, shared.rows);
    tq_attend_codes(place, inputs, work, shared, running);
  }
  tq_merge_warps(place, running, shared.rows);
  tq_write_part(place, work, shared.rows, parts);
}
