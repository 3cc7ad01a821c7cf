// Exact rows of 32 bits, for which tensor cores are too coarse: a warp takes every WARPS-th 16 rows for one query row after
// the other, each lane DV / 32 dims. Slow, and rare: models are served in 16 bits. Ends in the layout of mma_exact.h.
#pragma once
#include "mma_block.h"

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
        for (int d = int(place.lane); d < D; d += 32) dot += float(key[d]) * float(query[d * inputs.dim_stride]);
      }
      dot = tq_lane_sum(dot);
      const bool seen = lives && tq_sees_exact(work, tq_position_of(work, row), start + t);
      if (place.lane == 0) scores[row * 16 + t] = seen ? dot * work.step.scale : TQ_MASKED;
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
