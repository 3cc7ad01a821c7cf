// What the portable and the 8x8-matrix decode kernels share: a block's queries in shared memory, its exact rows, and the
// part that it writes. Blocks have WARPS warps.
#pragma once
#include "append.h"
#include "softmax.h"

TQ_CONSTANT int THREADS = 32 * WARPS;
TQ_CONSTANT int K_BYTES = D * KBITS / 8;
TQ_CONSTANT int V_BYTES = DV * VBITS / 8;
TQ_CONSTANT int K_LEVELS = 1 << (KBITS + K_TRELLIS);  // a trellis has twice as many as its bits could tell apart
TQ_CONSTANT int V_LEVELS = 1 << (VBITS + V_TRELLIS);
TQ_CONSTANT int PAIRS = (DV + 63) / 64;

// Of a block's rows: totals of the warps' merge (first scratch of the rotation), q . mean_k of the dims that do not turn,
// each warp's softmax, and what gives q . mean_k of the others.
struct TqBlockRows {
  float work[ROWS * (D > DV ? D : DV)];
  float mean[ROWS], peak[WARPS * ROWS], mass[WARPS * ROWS];
  TqTurnedPair turned[TURN_PAIRS > 0 ? ROWS * TURNED : 1];  // zeros behind the last pair
};

// The running softmax of the rows over the tokens that a warp has seen: every lane knows the peaks; masses are sums over
// lanes; a lane owns dims 2 * lane + 64 * i and the next.
struct TqRunning {
  float peak[LIVE], mass[LIVE], total[LIVE][PAIRS * 2];
};
TQ_FN int tq_dim_of(uint lane, int i) { return 2 * int(lane) + 64 * (i / 2) + i % 2; }

TQ_FN void tq_start(TQ_THREAD TqRunning& running) {
  for (int r = 0; r < LIVE; r++) {
    running.peak[r] = TQ_NO_PEAK;
    running.mass[r] = 0.0f;
    for (int i = 0; i < PAIRS * 2; i++) running.total[r][i] = 0.0f;
  }
}

// A row's weight of the lane's token, with which its totals have faded.
TQ_FN float tq_weigh_row(TQ_THREAD TqRunning& running, int r, float score) {
  float fade;
  const float weight = tq_weigh(score, running.peak[r], running.mass[r], fade);
  for (int i = 0; i < PAIRS * 2; i++) running.total[r][i] *= fade;
  return weight;
}

// Queries as base-2 logits, (ROWS, D). Rows beyond the group, or beyond a sequence's queries, are zero and see nothing.
TQ_FN void tq_load_queries(TqPlace place, TqDecodeInputs inputs, TqWork work, TQ_SHARED float* q) {
  for (int i = int(place.tid); i < ROWS * D; i += THREADS) {
    const int row = i / D;
    float x = 0.0f;
    if (tq_lives(work, row)) {
      x = float(tq_query_dim(inputs, work, tq_query_row(inputs, work, row), i % D)) * work.step.scale;
    }
    q[i] = x;
  }
  TQ_BARRIER();
}

// Queries with the keys' mean (D,).
TQ_FN void tq_multiply_mean(TqPlace place, const TQ_DEVICE float* mean, const TQ_SHARED float* q,
                            TQ_SHARED TqBlockRows& rows) {
  for (int r = int(place.warp); r < ROWS; r += WARPS) {
    float dot = 0.0f;
    for (int d = 2 * TURN_PAIRS + int(place.lane); d < D; d += 32) dot += q[r * D + d] * mean[d];
    dot = tq_lane_sum(dot);
    if (place.lane == 0) rows.mean[r] = dot;
  }
  if (TURN_PAIRS == 0) return;
  for (int i = int(place.tid); i < ROWS * TURNED; i += THREADS) {
    const int pair = i % TURNED, first = tq_first_dim(pair), second = tq_second_dim(pair);
    const TQ_SHARED float* row = q + i / TURNED * D;
    if (pair < TURN_PAIRS) {
      const TqTurnedPair made = tq_turned_pair(row[first], row[second], mean[first], mean[second]);
      rows.turned[i].u = made.u;  // a struct of a thread is not assigned to one of a block as a whole
      rows.turned[i].w = made.w;
    } else {
      rows.turned[i].u = rows.turned[i].w = 0.0f;
    }
  }
}

// What a tile's keys of 32 tokens get for their mean, base-2 logits: of row r in the tile's block b in lane 2 * r + b.
TQ_FN float tq_mean_scores(TqPlace place, const TQ_SHARED TqBlockRows& rows, const TQ_DEVICE float* turns, int tile) {
  const int lane = int(place.lane), row = lane / 2 % 8, half_turned = lane / 16 * (TURNED / 2);
  const TQ_DEVICE float* at = turns + ulong(2 * tile + lane % 2) * (2 * TURNED);
  float sum = 0.0f;
  if (row < ROWS) {
    for (int j = half_turned; j < half_turned + TURNED / 2; j++) {
      const TQ_SHARED TqTurnedPair& pair = rows.turned[row * TURNED + j];
      sum += pair.u * at[j] + pair.w * at[TURNED + j];
    }
  }
  sum += tq_shuffle_xor(sum, 16);
  return sum + (row < ROWS ? rows.mean[row] : 0.0f);
}

// q . mean_k of each row, and the queries into the keys' rotated basis.
TQ_FN void tq_rotate_queries(TqPlace place, const TQ_DEVICE float* constants, int head, TQ_SHARED float* q,
                             TQ_SHARED TqBlockRows& rows) {
  tq_multiply_mean(place, constants + K_ROTATION + head * D, q, rows);
  TQ_BARRIER();
  if (tq_is_power_of_two(D)) {
    // sign / sqrt(D), the rotation's first row: a Sylvester matrix begins with ones.
    for (int i = int(place.tid); i < LIVE * D; i += THREADS) q[i] *= constants[i % D];
    tq_hadamard(q, LIVE, D, place.tid, THREADS);  // rows that do not exist are zero and stay so
  } else {
    for (int i = int(place.tid); i < D; i += THREADS) {
      float sum[ROWS];
      for (int r = 0; r < ROWS; r++) sum[r] = 0.0f;
      for (int d = 0; d < D; d++) {
        const float c = constants[d * D + i];  // stored transposed, so that threads read neighbours
        for (int r = 0; r < ROWS; r++) sum[r] += q[r * D + d] * c;
      }
      for (int r = 0; r < ROWS; r++) rows.work[r * D + i] = sum[r];
    }
    TQ_BARRIER();
    for (int i = int(place.tid); i < ROWS * D; i += THREADS) q[i] = rows.work[i];
    TQ_BARRIER();
  }
}

// Exact rows, sink then window: a tile of 32 a warp, for scores a token a lane, for values a pair of dims a lane.
TQ_FN void tq_attend_exact(TqPlace place, TqWork work, TqExactRows exact, const TQ_SHARED float* q,
                           TQ_THREAD TqRunning& running) {
  const int num_exact = tq_num_exact(work);
  for (int start = int(place.warp) * 32; start < num_exact; start += THREADS) {
    const int token = start + int(place.lane);
    float score[LIVE];
    for (int r = 0; r < LIVE; r++) score[r] = 0.0f;
    if (token < num_exact) {
      const TQ_DEVICE Exact* key = tq_exact_row(exact.sink_k, exact.window_k, work, token);
#pragma unroll 4
      for (int d = 0; d < D; d += 8) {
        float x[8];
        tq_load8(key + d, x);
        for (int r = 0; r < LIVE; r++) {
          for (int i = 0; i < 8; i++) score[r] += q[r * D + d + i] * x[i];
        }
      }
    }
    for (int r = 0; r < LIVE; r++) {
      const bool seen = tq_lives(work, r) && tq_sees_exact(work, tq_position_of(work, r), token);
      if (CAPPED) score[r] = tq_capped(score[r], work.step.cap);
      score[r] = tq_weigh_row(running, r, seen ? score[r] : TQ_MASKED);
    }
    const int count = num_exact - start < 32 ? num_exact - start : 32;
#pragma unroll 8
    for (int t = 0; t < count; t++) {
      float weight[LIVE];
      for (int r = 0; r < LIVE; r++) weight[r] = tq_shuffle(score[r], uint(t));
      const TQ_DEVICE Exact* value = tq_exact_row(exact.sink_v, exact.window_v, work, start + t);
      for (int i = 0; i < PAIRS * 2; i++) {
        const int d = tq_dim_of(place.lane, i);
        if (d < DV) {
          const float x = float(value[d]);
          for (int r = 0; r < LIVE; r++) running.total[r][i] += weight[r] * x;
        }
      }
    }
  }
}

// The largest of the warps' peaks of a row.
TQ_FN float tq_top_of(const TQ_SHARED TqBlockRows& rows, int row) {
  float top = TQ_NO_PEAK;
  for (int i = 0; i < WARPS; i++) top = tq_max(top, rows.peak[i * ROWS + row]);
  return top;
}

// The warps' softmaxes become one: totals in rows.work, one warp after the other.
TQ_FN void tq_merge_warps(TqPlace place, const TQ_THREAD TqRunning& running, TQ_SHARED TqBlockRows& rows) {
  for (int r = 0; r < LIVE; r++) {
    const float sum = tq_lane_sum(running.mass[r]);
    if (place.lane == 0) {
      rows.peak[int(place.warp) * ROWS + r] = running.peak[r];
      rows.mass[int(place.warp) * ROWS + r] = sum;
    }
  }
  TQ_BARRIER();
  for (int w = 0; w < WARPS; w++) {
    if (int(place.warp) == w) {
      for (int r = 0; r < LIVE; r++) {
        const float weight = tq_exp2(running.peak[r] - tq_top_of(rows, r));
        for (int i = 0; i < PAIRS * 2; i++) {
          const int d = tq_dim_of(place.lane, i);
          if (d < DV) {
            rows.work[r * DV + d] = running.total[r][i] * weight + (w > 0 ? rows.work[r * DV + d] : 0.0f);
          }
        }
      }
    }
    TQ_BARRIER();
  }
}

// The block's merged rows go out.
TQ_FN void tq_write_part(TqPlace place, TqWork work, const TQ_SHARED TqBlockRows& rows, TQ_DEVICE float* parts) {
  const ulong part = tq_part_of(place);
  for (int i = int(place.tid); i < LIVE * DV; i += THREADS) parts[part * (LIVE * DV) + i] = rows.work[i];
  if (int(place.tid) < LIVE) {
    const int row = int(place.tid);
    const float top = tq_top_of(rows, row);
    float sum = 0.0f;
    for (int i = 0; i < WARPS; i++) sum += rows.mass[i * ROWS + row] * tq_exp2(rows.peak[i * ROWS + row] - top);
    const ulong at = tq_stats_of(work, part) + row * 2;
    parts[at] = top;
    parts[at + 1] = sum;
  }
}
