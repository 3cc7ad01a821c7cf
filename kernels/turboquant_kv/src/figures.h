// What a launch is told, as int32 values in device memory. Written by backends/gpu/figures.py, which says
// what each field means.
#pragma once

struct TqStepFigures {
  int tiles_per_block;
  int table_width;
  int blocks_per_group;
  int num_parts;
  float scale;
  int reach;
  float cap;
};
TQ_CONSTANT int STEP_WORDS = 7;
TQ_FN TqStepFigures tq_step_figures(const TQ_DEVICE int* at) {
  return {at[0], at[1], at[2], at[3], tq_as_float(at[4]), at[5], tq_as_float(at[6])};
}

struct TqSequenceFigures {
  int q_start;
  int num_queries;
  int num_pages;
  int sink_offset;
  int num_sink;
  int window_offset;
  int window_start;
  int num_window;
};
TQ_CONSTANT int SEQUENCE_WORDS = 8;
TQ_FN TqSequenceFigures tq_sequence_figures(const TQ_DEVICE int* at) {
  return {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7]};
}

struct TqEncodeFigures {
  int num_pages;
};
TQ_CONSTANT int ENCODE_WORDS = 1;
TQ_FN TqEncodeFigures tq_encode_figures(const TQ_DEVICE int* at) {
  return {at[0]};
}

struct TqPutFigures {
  int num_rows;
  int length;
  int rows_each;
};
TQ_CONSTANT int PUT_WORDS = 3;
TQ_FN TqPutFigures tq_put_figures(const TQ_DEVICE int* at) {
  return {at[0], at[1], at[2]};
}

struct TqHistoryFigures {
  int first_row;
  int first_page_id;
  int num_columns;
  int num_sink;
  int num_tokens;
  int sink_first;
  int window_first;
};
TQ_CONSTANT int HISTORY_WORDS = 7;
TQ_FN TqHistoryFigures tq_history_figures(const TQ_DEVICE int* at) {
  return {at[0], at[1], at[2], at[3], at[4], at[5], at[6]};
}

struct TqPrefillFigures {
  int first_row;
  int q_start;
  int num_queries;
  int num_rows;
  int num_sink;
  int num_tokens;
  int window_start;
  int num_window;
  float scale;
  float cap;
};
TQ_CONSTANT int PREFILL_WORDS = 10;
TQ_FN TqPrefillFigures tq_prefill_figures(const TQ_DEVICE int* at) {
  return {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], tq_as_float(at[8]), tq_as_float(at[9])};
}
