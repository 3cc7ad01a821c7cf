// A token of each row of logits, drawn by a block: softmax at the row's temperature, min-p, top-p, then the token at which
// the running sum of weights passes a random number. Weights are whole numbers in units of about 2^-31 of the row, so
// sums are exact in whatever order threads add them; they are made anew from the logits in each pass over the row, which
// costs less than keeping them. Blocks: y a row.
#pragma once
#include "common.h"

TQ_CONSTANT int DRAW_WARPS = DRAW_THREADS / 32;
TQ_CONSTANT int SEGMENT = (VOCAB + DRAW_THREADS - 1) / DRAW_THREADS * 32;  // neighbouring tokens that a warp reads
TQ_CONSTANT float TQ_NO_LOGIT = -3.4e38f;

// logits (rows, VOCAB); params (rows, 3): log2(e) / temperature, 0 for the likeliest token; log2 of min-p; top-p. numbers
// (rows,): random, of 32 bits.
struct TqDrawInputs {
  const TQ_DEVICE Logit* logits;
  const TQ_DEVICE float* params;
  const TQ_DEVICE uint* numbers;
};

struct TqDrawShared {
  float floats[DRAW_WARPS];
  uint words[DRAW_WARPS];
};

// A row, and what makes its weights: the largest logit, and the power of two that brings their sum to 2^30 and more.
struct TqDrawRow {
  const TQ_DEVICE Logit* logits;
  float best, octaves, log2_min_p, scale;
};
TQ_FN float tq_draw_mass(TqDrawRow row, int i) {
  const float below = (float(row.logits[i]) - row.best) * row.octaves;
  return below >= row.log2_min_p ? tq_exp2(below) : 0.0f;  // a NaN weighs nothing
}
TQ_FN uint tq_draw_weight(TqDrawRow row, int i) { return uint(tq_draw_mass(row, i) * row.scale + 0.5f); }

// Upper half of a product.
TQ_FN uint tq_high_product(uint a, uint b) {
  const uint low = (a & 0xffff) * (b & 0xffff), cross = (a >> 16) * (b & 0xffff) + (low >> 16);
  return (a >> 16) * (b >> 16) + (cross >> 16) + (((a & 0xffff) * (b >> 16) + (cross & 0xffff)) >> 16);
}

TQ_FN uint tq_lane_total(uint x, uint lane) {
  for (uint step = 16; step > 0; step >>= 1) x += tq_shuffle(x, lane ^ step);
  return x;
}

// Sums, largest and smallest over a block, known to all of it.
TQ_FN float tq_block_sum(TqPlace place, float x, TQ_SHARED TqDrawShared& shared) {
  x = tq_lane_sum(x);
  TQ_BARRIER();
  if (place.lane == 0) shared.floats[place.warp] = x;
  TQ_BARRIER();
  float total = 0.0f;
  for (int i = 0; i < DRAW_WARPS; i++) total += shared.floats[i];
  return total;
}
TQ_FN float tq_block_max(TqPlace place, float x, TQ_SHARED TqDrawShared& shared) {
  x = tq_lane_max(x);
  TQ_BARRIER();
  if (place.lane == 0) shared.floats[place.warp] = x;
  TQ_BARRIER();
  float most = shared.floats[0];
  for (int i = 1; i < DRAW_WARPS; i++) most = tq_max(most, shared.floats[i]);
  return most;
}
TQ_FN uint tq_block_total(TqPlace place, uint x, TQ_SHARED TqDrawShared& shared) {
  x = tq_lane_total(x, place.lane);
  TQ_BARRIER();
  if (place.lane == 0) shared.words[place.warp] = x;
  TQ_BARRIER();
  uint total = 0;
  for (int i = 0; i < DRAW_WARPS; i++) total += shared.words[i];
  return total;
}

// Sum of a row's weights that are `least` or more.
TQ_FN uint tq_draw_total(TqPlace place, TqDrawRow row, uint least, TQ_SHARED TqDrawShared& shared) {
  const int first = int(place.warp) * SEGMENT + int(place.lane);
  uint total = 0;
  for (int k = 0; k < SEGMENT; k += 32) {
    if (first + k >= VOCAB) continue;
    const uint weight = tq_draw_weight(row, first + k);
    if (weight >= least) total += weight;
  }
  return tq_block_total(place, total, shared);
}

// The smallest weight that top-p keeps: the largest bound w = largest / 2^(n / 256) at which weights >= w sum up to top_p of
// the row, by 13 steps that halve.
TQ_FN uint tq_draw_threshold(TqPlace place, TqDrawRow row, float top_p, TQ_SHARED TqDrawShared& shared) {
  const uint total = tq_draw_total(place, row, 1u, shared), most = uint(row.scale + 0.5f);
  const uint share = uint(float(total) * top_p), at_most = share < total ? share : total, needed = at_most > 1u ? at_most : 1u;
  float above = float(most) * tq_draw_step(0u);
  for (uint i = 2; i < 15; i++) {
    const float trial = above * tq_draw_step(i);
    if (tq_draw_total(place, row, uint(trial), shared) < needed) above = trial;
  }
  const uint bound = uint(above * tq_draw_step(1u)), low = bound < most ? bound : most;
  return low > 1u ? low : 1u;
}

// The token at which the running sum of weights >= least passes `target`. words: of each warp's tokens, its sum. Warp 0 to
// the last one look for the one whose sum it falls into, which then goes through its tokens.
TQ_FN void tq_draw_find(TqPlace place, TqDrawRow row, uint least, uint target, TQ_SHARED TqDrawShared& shared,
                        TQ_DEVICE uint* token) {
  uint running = 0;
  for (int i = 0; i < int(place.warp); i++) running += shared.words[i];
  if (target < running || target - running >= shared.words[place.warp]) return;
  const int first = int(place.warp) * SEGMENT;
  for (int k = 0; k < SEGMENT; k += 32) {
    const int i = first + k + int(place.lane);
    uint sum = 0;
    if (i < VOCAB) {
      const uint weight = tq_draw_weight(row, i);
      if (weight >= least) sum = weight;
    }
    for (uint step = 1; step < 32; step <<= 1) {
      const uint before = tq_shuffle(sum, place.lane >= step ? place.lane - step : place.lane);
      if (place.lane >= step) sum += before;
    }
    const uint passed = tq_lane_total(running + sum <= target ? 1u : 0u, place.lane);
    if (passed < 32u) {
      if (place.lane == 0) *token = uint(first + k) + passed;
      return;
    }
    running += tq_shuffle(sum, 31u);
  }
}

// tokens (rows,); is_broken (rows,): 1 where a logit is NaN or the largest is not finite, and the token means nothing.
TQ_FN void tq_draw(TqPlace place, TqDrawInputs inputs, TQ_DEVICE uint* tokens, TQ_DEVICE uchar* is_broken,
                   TQ_SHARED TqDrawShared& shared) {
  const int number = int(place.block_y), first = int(place.warp) * SEGMENT + int(place.lane);
  const TQ_DEVICE float* params = inputs.params + number * 3;
  TqDrawRow row;
  row.logits = inputs.logits + ulong(number) * VOCAB;
  row.octaves = params[0];
  row.log2_min_p = params[1];
  row.scale = 1.0f;
  float most = TQ_NO_LOGIT, broken = 0.0f;
  for (int k = 0; k < SEGMENT; k += 32) {
    if (first + k >= VOCAB) continue;
    const float x = float(row.logits[first + k]);
    if (x == x) most = tq_max(most, x);
    else broken = 1.0f;
  }
  row.best = tq_block_max(place, most, shared);
  broken = tq_block_max(place, broken, shared);
  if (place.tid == 0) is_broken[number] = broken > 0.0f || !(row.best > TQ_NO_LOGIT && row.best < -TQ_NO_LOGIT);
  if (row.octaves == 0.0f) {  // the first of the likeliest; as floats, because ids are below 2^24
    float least = float(VOCAB - 1);
    for (int k = SEGMENT - 32; k >= 0; k -= 32) {
      if (first + k < VOCAB && float(row.logits[first + k]) == row.best) least = float(first + k);
    }
    const float id = -tq_block_max(place, -least, shared);
    if (place.tid == 0) tokens[number] = uint(id);
    return;
  }
  float mass = 0.0f;
  for (int k = 0; k < SEGMENT; k += 32) {
    if (first + k < VOCAB) mass += tq_draw_mass(row, first + k);
  }
  mass = tq_block_sum(place, mass, shared);
  row.scale = 1073741824.0f;
  for (int i = 0; i < 32 && mass >= 2.0f; i++) {
    mass *= 0.5f;
    row.scale *= 0.5f;
  }
  const uint least = params[2] < 1.0f ? tq_draw_threshold(place, row, params[2], shared) : 1u;
  const uint total = tq_draw_total(place, row, least, shared);
  if (place.tid == 0) tokens[number] = uint(VOCAB - 1);  // of rows that are broken nothing is found
  TQ_DEVICE_BARRIER();
  tq_draw_find(place, row, least, tq_high_product(inputs.numbers[number], total), shared, tokens + number);
}
