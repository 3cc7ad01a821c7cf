// The parts of one output row, as the merging kernels read them (work.h says where they lie).
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
