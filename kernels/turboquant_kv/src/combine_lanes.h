// All parts of an output row to the row, for a power of two of dims, a block a row: log-sum-exp, attention sinks, back
// from the values' rotated basis, mean_v. A warp takes every WARPS-th part, a lane every 32nd dim.
#pragma once
#include "parts.h"

TQ_CONSTANT int PER = DV / 32;

struct TqLanesShared {
  float work[WARPS * DV];
};

// Weighted sums of a warp's compressed parts; of all parts, each lane's share of the masses (part 0's apart, with its
// weight, in lane 0).
struct TqMerged {
  float sum[PER], exact_weight, exact, compressed;
};

TQ_FN TqMerged tq_merge_parts(TqPlace place, TqOutputRow row, float top) {
  TqMerged merged;
  merged.exact_weight = merged.exact = merged.compressed = 0.0f;
  for (int e = 0; e < PER; e++) merged.sum[e] = 0.0f;
  for (int base = 0; base < row.num_parts; base += 32) {
    const int i = base + int(place.lane);
    const float weight = i < row.num_parts ? tq_exp2(tq_peak_of(row, i) - top) : 0.0f;
    const float mass = i < row.num_parts ? weight * tq_mass_of(row, i) : 0.0f;
    if (i == 0) {
      merged.exact_weight = weight;
      merged.exact = mass;
    } else {
      merged.compressed += mass;
    }
    const int last = row.num_parts - base < 32 ? row.num_parts - base : 32;
#pragma unroll 4
    for (int j = int(place.warp); j < last; j += WARPS) {
      const float w = base + j == 0 ? 0.0f : tq_shuffle(weight, uint(j));
      const TQ_DEVICE float* from = tq_totals_of(row, base + j) + place.lane;
      for (int e = 0; e < PER; e++) merged.sum[e] += w * from[32 * e];
    }
  }
  return merged;
}

template <typename Sinks>
TQ_FN void tq_combine_lanes(TqPlace place, TqCombineInputs inputs, Sinks sinks, TQ_DEVICE Out* out,
                            TQ_SHARED TqLanesShared& shared) {
  const TqOutputRow row = tq_output_row(place, inputs);
  const float sink = tq_sink_logit(sinks, row.q_head);
  const float top = tq_top_peak(row, sink, place.lane);
  TqMerged merged = tq_merge_parts(place, row, top);
  for (int e = 0; e < PER; e++) shared.work[place.warp * DV + place.lane + 32 * e] = merged.sum[e];
  TQ_BARRIER();
  if (place.warp == 0) {
    for (int e = 0; e < PER; e++) {
      for (int w = 1; w < WARPS; w++) merged.sum[e] += shared.work[w * DV + place.lane + 32 * e];
    }
    tq_lane_hadamard<PER>(merged.sum, place.lane);
    const float compressed = tq_lane_sum(merged.compressed);
    const float exact = tq_shuffle(merged.exact, 0u);
    const float exact_weight = tq_shuffle(merged.exact_weight, 0u);
    const float all = compressed + exact + tq_sink_mass(sink, top);
    const bool lives = all > 0.0f && row.lives;
    const TQ_DEVICE float* means = inputs.v_constants + V_ROTATION + (row.q_head / G) * DV;
    for (int e = 0; e < PER; e++) {
      const int d = int(place.lane) + 32 * e;
      const float x = merged.sum[e] * inputs.v_constants[d] + compressed * means[d] + exact_weight * row.totals[d];
      tq_output_at(row, out)[d] = Out(lives ? x / all : 0.0f);
    }
  }
}
