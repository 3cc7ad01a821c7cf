// Means of keys that turn with position (codec/rotary.py): TURN_PAIRS pairs of dims turn, 0 where one mean serves all
// positions; NEIGHBOURS: partners lie side by side, else TURN_PAIRS apart. The mean is one for each block of MEAN_BLOCK tokens.
//
// `turns` has a row for each block of a conversation behind its sink: cosines, then sines of the pairs' angles at the
// block's middle, TURNED of each. As floats, or for tensor cores as halves and behind them what the halves left out.
#pragma once
#include "common.h"

TQ_CONSTANT int MEAN_BLOCK = 16;
TQ_CONSTANT int TURNED = (TURN_PAIRS + 7) / 8 * 8;  // zeros behind the last pair: products take 16 dims at once

TQ_FN constexpr int tq_first_dim(int pair) { return NEIGHBOURS ? 2 * pair : pair; }
TQ_FN constexpr int tq_second_dim(int pair) { return NEIGHBOURS ? 2 * pair + 1 : pair + TURN_PAIRS; }

// Of dims d ... d + 7, a head's mean in the block of compressed token `token`. means: of the head, before the turn.
TQ_FN void tq_mean8(const TQ_DEVICE float* means, const TQ_DEVICE float* turns, int token, int d, TQ_THREAD float* out) {
  tq_load8(means + d, out);
  if (TURN_PAIRS == 0) return;
  const TQ_DEVICE float* row = turns + ulong(token / MEAN_BLOCK) * (2 * TURNED);
  for (int i = 0; i < 8; i++) {
    const int dim = d + i;
    if (dim >= 2 * TURN_PAIRS) continue;
    const bool is_second = NEIGHBOURS ? dim % 2 == 1 : dim >= TURN_PAIRS;
    const int pair = NEIGHBOURS ? dim / 2 : dim - (is_second ? TURN_PAIRS : 0);
    const float other = means[is_second ? tq_first_dim(pair) : tq_second_dim(pair)];
    out[i] = out[i] * row[pair] + (is_second ? other : -other) * row[TURNED + pair];
  }
}

// What a query's products with a mean are made of, for a pair of dims: q . R(p) mean is the sum of
// u cos(angle) + w sin(angle) over pairs, and of what dims in no pair give.
struct TqTurnedPair {
  float u, w;
};
TQ_FN TqTurnedPair tq_turned_pair(float q_first, float q_second, float mean_first, float mean_second) {
  return {q_first * mean_first + q_second * mean_second, q_second * mean_first - q_first * mean_second};
}
