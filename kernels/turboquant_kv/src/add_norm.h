// Two rows added, and the sum normalised (RMSNorm, arXiv 1910.07467): what stands between the halves of a decoder layer,
// of each row by a block. The sum is rounded before it is squared, as where it is an array of its own. Blocks: y a row.
#pragma once
#include "common.h"

TQ_CONSTANT int NORM_WARPS = NORM_THREADS / 32;
TQ_CONSTANT int NORM_PIECES = WIDTH / 8;

// x, y (rows, WIDTH), weight (WIDTH,).
struct TqNormInputs {
  const TQ_DEVICE Elem* x;
  const TQ_DEVICE Elem* y;
  const TQ_DEVICE Elem* weight;
};

// sum (rows, WIDTH): x + y; normed (rows, WIDTH): weight * sum / sqrt(mean of its squares + EPS).
TQ_FN void tq_add_norm(TqPlace place, TqNormInputs inputs, TQ_DEVICE Elem* sum, TQ_DEVICE Elem* normed,
                       TQ_SHARED float* of_warps) {
  const ulong first = ulong(place.block_y) * WIDTH;
  float squares = 0.0f;
  for (int i = int(place.tid); i < NORM_PIECES; i += NORM_THREADS) {
    float x[8], y[8];
    tq_load8(inputs.x + first + 8 * i, x);
    tq_load8(inputs.y + first + 8 * i, y);
    for (int j = 0; j < 8; j++) {
      x[j] = float(Elem(x[j] + y[j]));
      squares += x[j] * x[j];
    }
    tq_store8(sum + first + 8 * i, x);
  }
  squares = tq_lane_sum(squares);
  if (place.lane == 0) of_warps[place.warp] = squares;
  TQ_BARRIER();
  float total = 0.0f;
  for (int i = 0; i < NORM_WARPS; i++) total += of_warps[i];
  const float factor = 1.0f / tq_sqrt(total / float(WIDTH) + EPS);
  for (int i = int(place.tid); i < NORM_PIECES; i += NORM_THREADS) {
    float x[8], weight[8];
    tq_load8(sum + first + 8 * i, x);  // a thread reads what it wrote itself
    tq_load8(inputs.weight + 8 * i, weight);
    for (int j = 0; j < 8; j++) x[j] = float(Elem(x[j] * factor)) * weight[j];
    tq_store8(normed + first + 8 * i, x);
  }
}
