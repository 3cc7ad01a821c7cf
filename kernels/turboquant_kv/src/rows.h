// Rows from one array to places in another: exact rows, or whole pages as bytes. Blocks: x ROW_THREADS elements of a row, y a
// row, z a head.
#pragma once
#include "common.h"
#include "figures.h"

TQ_CONSTANT int ROW_THREADS = 128;

// source (sequences, HEADS, rows, length), strided, its row i being row i % rows_each of sequence i / rows_each; target
// (HEADS, rows, length), its rows dense. places: num_rows rows of the source, then where each goes.
struct TqPutInputs {
  const TQ_DEVICE Element* source;
  long sequence_stride, head_stride, row_stride, element_stride;
  const TQ_DEVICE Element* target;
  long target_head_stride, target_row_stride;
  const TQ_DEVICE int* places;
};

TQ_FN void tq_put_rows(TqPlace place, TqPutInputs inputs, TqPutFigures figures) {
  const int element = int(place.block_x) * ROW_THREADS + int(place.tid), i = int(place.block_y), head = int(place.block_z);
  if (element >= figures.length) return;
  const int from = inputs.places[i], to = inputs.places[figures.num_rows + i];
  const TQ_DEVICE Element* source = inputs.source +
      (from / figures.rows_each * inputs.sequence_stride + head * inputs.head_stride +
       from % figures.rows_each * inputs.row_stride + element * inputs.element_stride);
  TQ_DEVICE Element* target = TQ_WRITABLE(Element, inputs.target) +
      (head * inputs.target_head_stride + to * inputs.target_row_stride + element);
  *target = *source;
}
