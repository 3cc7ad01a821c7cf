// What the decode kernels read, and where a row of it lies.
#pragma once
#include "work.h"

// What a decode kernel reads: queries (B, HEADS * G, QROWS, D), strided; page_table (B, table_width); pages
// (P, HEADS, PAGE) of codes and scales; k_constants: what rotates queries, K_ROTATION values, then the keys' means
// (HEADS, D).
struct TqDecodeInputs {
  const TQ_DEVICE In* queries;
  long sequence_stride, head_stride, query_stride, dim_stride;
  const TQ_DEVICE int* plan;
  const TQ_DEVICE int* page_table;
  const TQ_DEVICE uchar* k_codes;
  const TQ_DEVICE Half* k_scales;
  const TQ_DEVICE uchar* v_codes;
  const TQ_DEVICE Half* v_scales;
  const TQ_DEVICE float* k_constants;
};

// Exact rows of all heads, (HEADS, rows, dims); a row's dims lie side by side.
struct TqRows {
  const TQ_DEVICE Exact* at;
  long head_stride, row_stride;
};
struct TqExactRows {
  TqRows sink_k, sink_v, window_k, window_v;
};
// From the arguments of a kernel, of which a batch has a set for each sequence: TQ_EXACT_ROWS(_2) is the third.
#define TQ_ROWS(name) {name, name##_strides[0], name##_strides[1]}
#define TQ_EXACT_ROWS(set) TqExactRows{TQ_ROWS(sink_k##set), TQ_ROWS(sink_v##set), TQ_ROWS(window_k##set), TQ_ROWS(window_v##set)}

// The query vector of a block's row; of a row that is not in the group, the group's first.
TQ_FN const TQ_DEVICE In* tq_query_row(TqDecodeInputs inputs, TqWork work, int row) {
  const int index = tq_group_row(work, row), safe = index < GROUP_ROWS ? index : 0;
  return inputs.queries + (work.sequence * inputs.sequence_stride + (work.head * G + safe / QROWS) * inputs.head_stride +
                           safe % QROWS * inputs.query_stride);
}

// Exact row `token` of a block's head and sequence, counted from the sink's first on, the window's behind the sink's.
TQ_FN const TQ_DEVICE Exact* tq_exact_row(TqRows sink, TqRows window, TqWork work, int token) {
  const TqSequenceFigures figures = work.figures;
  return token < figures.num_sink
      ? sink.at + (work.head * sink.head_stride + (figures.sink_offset + token) * sink.row_stride)
      : window.at + (work.head * window.head_stride + (figures.window_offset + token - figures.num_sink) * window.row_stride);
}
