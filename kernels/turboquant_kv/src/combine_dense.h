// As combine_lanes.h, for any number of dims: the rotation is a whole matrix. Threads: RUNS runs of WIDTH, WIDTH being DV
// rounded up to whole warps; compressed parts are summed RUNS at a time.
#pragma once
#include "parts.h"

struct TqDenseShared {
  float weights[MAX_PARTS];
  float compressed, all;  // masses: of compressed parts, of everything
  float work[RUNS * DV];
};

// Every part's weight and both masses, by a block's first warp.
TQ_FN void tq_weigh_parts(TqPlace place, TqOutputRow row, float sink, TQ_SHARED TqDenseShared& shared) {
  const float top = tq_top_peak(row, sink, place.lane);
  float compressed = 0.0f, exact = 0.0f;
  for (int i = int(place.lane); i < row.num_parts; i += 32) {
    const float weight = tq_exp2(tq_peak_of(row, i) - top);
    shared.weights[i] = weight;
    if (i > 0) compressed += weight * tq_mass_of(row, i);
    else exact = weight * tq_mass_of(row, i);
  }
  compressed = tq_lane_sum(compressed);
  exact = tq_lane_sum(exact);
  if (place.lane == 0) {
    shared.compressed = compressed;
    shared.all = compressed + exact + tq_sink_mass(sink, top);
  }
}

template <typename Sinks>
TQ_FN void tq_combine_dense(TqPlace place, TqCombineInputs inputs, Sinks sinks, TQ_DEVICE Out* out,
                            TQ_SHARED TqDenseShared& shared) {
  const TqOutputRow row = tq_output_row(place, inputs);
  if (place.warp == 0) tq_weigh_parts(place, row, tq_sink_logit(sinks, row.q_head), shared);
  TQ_BARRIER();
  const int d = int(place.tid) % WIDTH, run = int(place.tid) / WIDTH;
  const bool is_first = run == 0 && d < DV;  // one run writes what all have summed
  float exact_total = 0.0f;
  if (d < DV) {
    float sum = 0.0f;
#pragma unroll 8
    for (int i = 1 + run; i < row.num_parts; i += RUNS) sum += shared.weights[i] * tq_totals_of(row, i)[d];
    if (run == 0) exact_total = shared.weights[0] * row.totals[d];
    shared.work[run * DV + d] = sum;
  }
  TQ_BARRIER();
  if (is_first) {
    float sum = shared.work[d];
    for (int i = 1; i < RUNS; i++) sum += shared.work[i * DV + d];
    shared.work[d] = sum;
  }
  TQ_BARRIER();
  if (is_first) {
    float restored = 0.0f;
    for (int i = 0; i < DV; i++) restored += shared.work[i] * inputs.v_constants[i * DV + d];
    const float mean = inputs.v_constants[V_ROTATION + (row.q_head / G) * DV + d];
    const float sum = restored + shared.compressed * mean + exact_total;
    tq_output_at(row, out)[d] = Out(shared.all > 0.0f && row.lives ? sum / shared.all : 0.0f);
  }
}
