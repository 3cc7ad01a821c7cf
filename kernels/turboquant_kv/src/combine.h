// All parts of an output row to the row, a block a row: log-sum-exp, attention sinks, back from the values' rotated basis,
// mean_v. Once for a power of two of dims, once for any other; work.h says where parts lie.
#pragma once
#include "softmax.h"
#include "work.h"

// parts of a launch, its plan; v_constants: what rotates values back, V_ROTATION values, then their means (HEADS, DV).
struct TqCombineInputs {
  const TQ_DEVICE float* parts;
  const TQ_DEVICE int* plan;
  const TQ_DEVICE float* v_constants;
};

// An output row: of which query head, and where its parts lie. Part i has its peak and mass at stats[2 * LIVE * i] and
// its totals at totals[LIVE * DV * i]; part 0 is the exact rows'.
struct TqOutputRow {
  int sequence, q_head, query;
  int num_parts;
  bool lives;
  const TQ_DEVICE float* stats;
  const TQ_DEVICE float* totals;
};

// Blocks: x a query, y a query head, z a sequence.
TQ_FN TqOutputRow tq_output_row(TqPlace place, TqCombineInputs inputs) {
  TqOutputRow row;
  row.sequence = int(place.block_z);
  row.q_head = int(place.block_y);
  row.query = int(place.block_x);
  const TqStepFigures step = tq_step_figures(inputs.plan);
  const TqSequenceFigures figures = tq_figures_of(inputs.plan, row.sequence);
  row.num_parts = tq_num_parts(step, figures);
  row.lives = row.query < figures.num_queries;
  const int group_row = (row.q_head % G) * QROWS + row.query;
  const ulong row_group = (ulong(row.sequence) * CHUNKS + group_row / ROWS) * HEADS + row.q_head / G;
  const ulong first_row = row_group * step.blocks_per_group * LIVE + group_row % ROWS;
  row.stats = inputs.parts + ulong(step.num_parts) * (LIVE * DV) + first_row * 2;
  row.totals = inputs.parts + first_row * DV;
  return row;
}

TQ_FN float tq_peak_of(TqOutputRow row, int part) { return row.stats[part * 2 * LIVE]; }
TQ_FN float tq_mass_of(TqOutputRow row, int part) { return row.stats[part * 2 * LIVE + 1]; }
TQ_FN const TQ_DEVICE float* tq_totals_of(TqOutputRow row, int part) { return row.totals + ulong(part) * (LIVE * DV); }

// An attention sink's logit in base 2. Sinks: a pointer; few sinks lie in another of Metal's address spaces.
template <typename Sinks>
TQ_FN float tq_sink_logit(Sinks sinks, int q_head) {
  return USE_SINKS ? float(sinks[q_head]) * LOG2_E : TQ_NO_PEAK;
}
TQ_FN float tq_sink_mass(float logit, float top) { return USE_SINKS ? tq_exp2(logit - top) : 0.0f; }

// The largest of all parts' peaks and the sink's logit, known to all lanes of a warp.
TQ_FN float tq_top_peak(TqOutputRow row, float sink, uint lane) {
  float top = sink;
  for (int i = int(lane); i < row.num_parts; i += 32) top = tq_max(top, tq_peak_of(row, i));
  return tq_lane_max(top);
}

// out (B, HEADS * G, QROWS, DV).
TQ_FN TQ_DEVICE Out* tq_output_at(TqOutputRow row, TQ_DEVICE Out* out) {
  return out + ((ulong(row.sequence) * HEADS * G + row.q_head) * QROWS + row.query) * DV;
}

// For a power of two of dims: a warp takes every COMBINE_WARPS-th part, a lane every 32nd dim.

TQ_CONSTANT int PER = DV / 32;

struct TqLanesShared {
  float work[COMBINE_WARPS * DV];
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
    for (int j = int(place.warp); j < last; j += COMBINE_WARPS) {
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
      for (int w = 1; w < COMBINE_WARPS; w++) merged.sum[e] += shared.work[w * DV + place.lane + 32 * e];
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

// For any other number of dims, of which the rotation is a whole matrix. Threads: RUNS runs of WIDTH, WIDTH being DV
// rounded up to whole warps; compressed parts are summed RUNS at a time.

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
