// The online softmax in base 2.
#pragma once
#include "common.h"

// Scores are base-2 logits. Both stand-ins for minus infinity are finite, so that no mode of arithmetic can make NaN of
// them: exp2(TQ_MASKED - TQ_NO_PEAK) is 0, and so is the weight of a part that saw nothing beside one that did.
#define TQ_NO_PEAK -1e30f
#define TQ_MASKED -2e30f

// cap * tanh(score / cap), in whatever unit both are; 1e-7 of the cap off at most. NaN stays NaN.
TQ_FN float tq_capped(float score, float cap) {
  float twice = score * (2.88539008f / cap);  // exp(2 x) = exp2(twice); beyond these bounds tanh is 1
  twice = twice > 40.0f ? 40.0f : twice;
  twice = twice < -40.0f ? -40.0f : twice;
  return cap - 2.0f * cap / (tq_exp2(twice) + 1.0f);
}

// A new score of the one row that each of a warp's lanes holds another token of. Raises the row's peak, lets its mass
// fade and grow; returns the token's weight, and in `fade` what sums so far are multiplied with.
TQ_FN float tq_weigh(float score, TQ_THREAD float& peak, TQ_THREAD float& mass, TQ_THREAD float& fade) {
  const float new_peak = tq_max(peak, tq_lane_max(score));
  fade = tq_exp2(peak - new_peak);
  peak = new_peak;
  const float weight = tq_exp2(score - new_peak);
  mass = mass * fade + weight;
  return weight;
}
