// Exact rows: of 16 bits on tensor cores, of 32 bits plainly, 16 a warp at a time.
//
// Of 16 bits, keys and values go from memory to fragments as they are, the
// queries unscaled in their own type, so that products are exact; the scale is applied to the scores. Weights are two
// 16-bit parts for bfloat16, whose one would be too coarse.
#pragma once
#include "mma_block.h"

// Warps that have something to add; one always writes the part.
TQ_FN int tq_num_busy_exact(TqWork work) { return max(1, min(WARPS, (tq_num_exact(work) + 15) / 16)); }

// The block's queries in their own type, (8, Q_PITCH), at the arena's beginning. Rows that do not exist are zero.
TQ_FN void tq_load_raw_queries(TqPlace place, TqDecodeInputs inputs, TqWork work, Exact* out) {
  for (int i = int(place.tid); i < 8 * D; i += THREADS) {
    const int row = i / D, d = i % D;
    const bool lives = tq_lives(work, row);
    out[row * Q_PITCH + d] = lives ? Exact(tq_query_dim(inputs, work, tq_query_row(inputs, work, row), d)) : Exact(0.0f);
  }
  __syncthreads();
}

// A lane's share of 16 rows from `start` on, the last one repeated: a quarter of the keys r and r + 8, an eighth of the
// values 2c, 2c + 1, 2c + 8 and 2c + 9.
struct TqExactFragments {
  uint key[2][D / 8], value[4][DV / 16];
};
TQ_FN void tq_load_exact(TqExactFragments& made, TqWork work, TqExactRows exact, TqLane at, int start) {
  const int last = tq_num_exact(work) - 1;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const Exact* row = tq_exact_row(exact.sink_k, exact.window_k, work, min(start + at.r + 8 * i, last));
    tq_device_words<D / 8>(row + at.c * (D / 4), made.key[i]);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int token = min(start + 2 * at.c + (i & 1) + 4 * (i & 2), last);
    const Exact* row = tq_exact_row(exact.sink_v, exact.window_v, work, token);
    tq_device_words<DV / 16>(row + at.r * (DV / 8), made.value[i]);
  }
}

// Scores of rows start + r and + 8 by the lane's two queries, masked where they do not see.
TQ_FN void tq_score_exact(const TqExactFragments& given, TqWork work, const Exact* queries, TqLane at, int start, float* s) {
  const uint* q_row = reinterpret_cast<const uint*>(queries + at.r * Q_PITCH + at.c * (D / 4));
  s[0] = s[1] = s[2] = s[3] = 0.0f;
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    tq_mma_as<Exact>(s, given.key[0][2 * i], given.key[1][2 * i], given.key[0][2 * i + 1], given.key[1][2 * i + 1],
                     q_row[2 * i], q_row[2 * i + 1]);
  }
  const int query_0 = tq_position_of(work, 2 * at.c), query_1 = tq_position_of(work, 2 * at.c + 1);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const bool seen = tq_sees_exact(work, i & 1 ? query_1 : query_0, start + at.r + (i & 2 ? 8 : 0));
    s[i] *= work.step.scale;
    if (CAPPED) s[i] = tq_capped(s[i], work.step.cap);
    if (!seen) s[i] = TQ_MASKED;
  }
}

// Adds values with weights p, which lie as scores do.
TQ_FN void tq_add_exact(const TqExactFragments& given, const float* p, TqMmaRows& rows) {
  const uint b_0 = tq_transpose(tq_pair_as<Exact>(p[0], p[1])), b_1 = tq_transpose(tq_pair_as<Exact>(p[2], p[3]));
  const uint rest_0 = tq_transpose(tq_pair_rest<Exact>(p[0], p[1])), rest_1 = tq_transpose(tq_pair_rest<Exact>(p[2], p[3]));
#pragma unroll
  for (int j = 0; j < DV / 16; j++) {
    // A word is dims 2j and 2j + 1 of the lane's eighth of one token.
    const uint first = given.value[0][j], second = given.value[1][j], third = given.value[2][j], last = given.value[3][j];
    const uint a_0 = __byte_perm(first, second, 0x5410), a_1 = __byte_perm(first, second, 0x7632);
    const uint a_2 = __byte_perm(third, last, 0x5410), a_3 = __byte_perm(third, last, 0x7632);
    tq_mma_as<Exact>(rows.o[j], a_0, a_1, a_2, a_3, b_0, b_1);
    if (tq_needs_rest<Exact>()) tq_mma_as<Exact>(rows.o[j], a_0, a_1, a_2, a_3, rest_0, rest_1);
  }
}

TQ_FN void tq_attend_exact(TqPlace place, TqDecodeInputs inputs, TqWork work, TqExactRows exact, uchar* arena,
                           TqMmaRows& rows) {
  Exact* queries = reinterpret_cast<Exact*>(arena);
  tq_load_raw_queries(place, inputs, work, queries);
  const TqLane at = tq_lane(place);
  for (int start = int(place.warp) * 16; start < tq_num_exact(work); start += 16 * WARPS) {
    TqExactFragments given;
    tq_load_exact(given, work, exact, at, start);
    float s[4];
    tq_score_exact(given, work, queries, at, start, s);
    tq_raise(rows, fmaxf(rows.peak[0], fmaxf(s[0], s[2])), fmaxf(rows.peak[1], fmaxf(s[1], s[3])));
    tq_weigh(rows, s);
    tq_add_exact(given, s, rows);
  }
}

// Of 32 bits, for which tensor cores are too coarse, a warp takes its 16 for one query row after the other, each lane
// DV / 32 dims. Slow, and rare: models are served in 16 bits. Ends in the layout of tensor cores.

// Scores of 16 exact rows by the block's 8 queries, (8, 16) in shared memory, by a warp.
TQ_FN void tq_score_plainly(TqPlace place, TqDecodeInputs inputs, TqWork work, TqExactRows exact, int start, float* scores) {
  const int last = tq_num_exact(work) - 1;
  for (int row = 0; row < 8; row++) {
    const bool lives = tq_lives(work, row);
    const In* query = tq_query_row(inputs, work, row);
    for (int t = 0; t < 16; t++) {
      const Exact* key = tq_exact_row(exact.sink_k, exact.window_k, work, min(start + t, last));
      float dot = 0.0f;
      if (lives) {
        for (int d = int(place.lane); d < D; d += 32) {
          dot += float(key[d]) * float(tq_query_dim(inputs, work, query, d));
        }
      }
      dot = tq_lane_sum(dot);
      const bool seen = lives && tq_sees_exact(work, tq_position_of(work, row), start + t);
      dot *= work.step.scale;
      if (CAPPED) dot = tq_capped(dot, work.step.cap);
      if (place.lane == 0) scores[row * 16 + t] = seen ? dot : TQ_MASKED;
    }
  }
  __syncwarp();
}

TQ_FN void tq_attend_exact_plainly(TqPlace place, TqDecodeInputs inputs, TqWork work, TqExactRows exact, uchar* arena,
                                   TqMmaRows& rows) {
  const TqLane at = tq_lane(place);
  const int num_exact = tq_num_exact(work);
  float* scores = reinterpret_cast<float*>(arena) + int(place.warp) * 128;
  const float *scores_0 = scores + 2 * at.c * 16, *scores_1 = scores_0 + 16;
  for (int start = int(place.warp) * 16; start < num_exact; start += 16 * WARPS) {
    tq_score_plainly(place, inputs, work, exact, start, scores);
    float peak_0 = rows.peak[0], peak_1 = rows.peak[1];
    for (int t = 0; t < 16; t++) {
      peak_0 = fmaxf(peak_0, scores_0[t]);
      peak_1 = fmaxf(peak_1, scores_1[t]);
    }
    tq_fade(rows, peak_0, peak_1);
    for (int t = 0; t < 16; t++) {
      const float p_0 = tq_exp2(scores_0[t] - rows.peak[0]), p_1 = tq_exp2(scores_1[t] - rows.peak[1]);
      if (at.r == 0) {  // masses are summed over the lanes of a column at the end
        rows.mass[0] += p_0;
        rows.mass[1] += p_1;
      }
      const Exact* value =
          tq_exact_row(exact.sink_v, exact.window_v, work, min(start + t, num_exact - 1)) + at.r * (DV / 8);
#pragma unroll
      for (int j = 0; j < DV / 16; j++) {
        const float even = float(value[2 * j]), odd = float(value[2 * j + 1]);
        rows.o[j][0] += p_0 * even;
        rows.o[j][1] += p_1 * even;
        rows.o[j][2] += p_0 * odd;
        rows.o[j][3] += p_1 * odd;
      }
    }
    __syncwarp();
  }
}
