// Exact rows to codes and scales (docs/codec.md): centred, rotated, divided by their root mean square, each coordinate's
// centroid found in the thresholds, of a trellis along the best path (encode_trellis.h). Blocks: x as many rows as PAGE_THREADS threads have vectors, y a head.
#pragma once
#include "encode_trellis.h"

// rows (HEADS, rows, D), strided; pages: ids of num_pages pages, then which of its conversation each is, then the row
// where each begins; constants: signs / sqrt(D) (D,), then means (HEADS, D); turns: of turning.h.
struct TqEncodeInputs {
  const TQ_DEVICE In* rows;
  long head_stride, row_stride, dim_stride;
  const TQ_DEVICE int* pages;
  const TQ_DEVICE float* constants;
  const TQ_DEVICE float* turns;
};

// All pages (P, HEADS, PAGE): packed codes, VECTOR_BYTES each, and scales.
struct TqEncodeOutputs {
  TQ_DEVICE uchar* packed;
  TQ_DEVICE Half* scales;
};

struct TqEncodeShared {
  float book[LEVELS], limits[LEVELS];
  float turned[BASE > 1 || TRELLIS ? VECTORS * TURN_PITCH : 4];  // rows on their way to columns, or to the search
  uchar codes[BASE > 1 || TRELLIS ? VECTORS * D : 4];            // and their codes, or own bits, on the way back
  TqTrellisShared trellis;
};

// A lane's codes as words (BASE 1), and sums over the whole vector: of squared centroids, of values times centroids.
TQ_CONSTANT int CODE_WORDS = BASE == 1 ? 2 * UNITS : 2;
struct TqCoded {
  uint words[CODE_WORDS];
  float c_energy, inner;
};

TQ_FN void tq_fill_tables(TQ_SHARED TqEncodeShared& shared, uint tid) {
  for (int i = int(tid); i < LEVELS; i += PAGE_THREADS) {
    shared.book[i] = tq_book[i];
    shared.limits[i] = tq_thresholds[TRELLIS || i < LEVELS - 1 ? i : 0];
  }
}

// A lane's share of token `token` of the pages, centred and with the rotation's signs. A whole block meets here.
TQ_FN void tq_centred(TqEncodeInputs inputs, TqShare mine, int token, int num_pages, TQ_SHARED float* turned, TQ_THREAD float* y) {
  const int page = token / PAGE, in_page = token % PAGE;
  const int row = inputs.pages[2 * num_pages + page] + in_page, compressed = inputs.pages[num_pages + page] * PAGE + in_page;
  const TQ_DEVICE In* from = inputs.rows + (mine.head * inputs.head_stride + row * inputs.row_stride);
  const bool is_wide = tq_is_wide(from, int(inputs.dim_stride));
  for (int k = 0; k < UNITS; k++) {
    const int d = 8 * (k * LANES + mine.part);
    if (d >= D) break;
    float x[8], sign[8], mean[8];
    tq_read_row(from, int(inputs.dim_stride), is_wide, d, x);
    tq_load8(inputs.constants + d, sign);
    tq_mean8(inputs.constants + D + mine.head * D, inputs.turns, compressed, d, mean);
    for (int i = 0; i < 8; i++) {
      const float centred = (x[i] - mean[i]) * sign[i];
      if (BASE == 1) y[8 * k + i] = centred;
      else turned[mine.vector * TURN_PITCH + d + i] = centred;
    }
  }
  TQ_BARRIER();
  if (BASE > 1) {
    for (int i = 0; i < PER; i++) y[i] = turned[mine.vector * TURN_PITCH + i * LANES + mine.part];
  }
}

// The code of a coordinate: how many thresholds lie below it.
TQ_FN uint tq_nearest(float z, const TQ_SHARED float* limits) {
  uint code = 0;
  for (uint step = 1u << (BITS - 1); step > 0; step >>= 1) {
    if (z > limits[code + step - 1]) code += step;
  }
  return code;
}

// The dim of a lane's rotated value i.
TQ_FN int tq_turned_dim(TqShare mine, int i) {
  return BASE == 1 ? 8 * (i / 8 * LANES + mine.part) + i % 8 : i * LANES + mine.part;
}

// Codes of a lane's rotated values; of columns, and of trellis codes the own bits, they go to shared memory.
TQ_FN TqCoded tq_quantised(const TQ_THREAD float* y, float inverse, TqShare mine, TQ_SHARED TqEncodeShared& shared) {
  TqCoded coded;
  coded.c_energy = coded.inner = 0.0f;
  for (int i = 0; i < CODE_WORDS; i++) coded.words[i] = 0;
  for (int i = 0; i < PER; i++) {
    const int d = tq_turned_dim(mine, i);
    const float z = y[i] * inverse;
    const uint code = TRELLIS ? tq_level_on_path(shared.trellis.branch + mine.vector * BLOCKS, d, z, shared.limits)
                              : tq_nearest(z, shared.limits);
    const float c = shared.book[code];
    coded.c_energy += c * c;
    coded.inner += y[i] * c;
    if (BASE == 1 && !TRELLIS) coded.words[tq_word_of_code<BITS>(i)] |= code << tq_shift_of_code<BITS>(i);
    else shared.codes[mine.vector * D + d] = uchar(TRELLIS ? code >> 2 : code);
  }
  coded.c_energy = tq_vector_sum(coded.c_energy);
  coded.inner = tq_vector_sum(coded.inner);
  return coded;
}

// The scale that a kind of codec wants (page_kernels.py numbers them), as far as float16 reaches.
TQ_FN float tq_scale_of(float energy, float rms, float c_energy, float inner) {
  float scale = rms;
  if (SCALE_KIND == 1) scale = tq_sqrt(energy / c_energy);
  if (SCALE_KIND == 2) scale = inner / c_energy;
  if (SCALE_KIND == 3) scale = energy / (inner <= 0.0f ? 1.0f : inner);
  if (rms == 0.0f) scale = 0.0f;
  return scale > 65504.0f ? 65504.0f : scale;
}

// A block's columns of codes to packed vectors; threads write neighbours. first_row: of the block.
TQ_FN void tq_pack(TQ_DEVICE uchar* packed, const TQ_SHARED uchar* codes, const TQ_DEVICE int* page_ids, int first_row, int last,
                   int head, uint tid) {
  for (int i = int(tid); i < VECTORS * VECTOR_BYTES; i += PAGE_THREADS) {
    const int vector = i / VECTOR_BYTES, k = i % VECTOR_BYTES, row = first_row + vector;
    uint byte = 0;
    for (int d = 8 * k / BITS; d * BITS < 8 * k + 8; d++) {
      const uint code = codes[vector * D + d];
      const int shift = d * BITS - 8 * k;
      byte |= shift >= 0 ? code << shift : code >> -shift;
    }
    if (row <= last) packed[ulong(tq_page_row(page_ids[row / PAGE], head, row)) * VECTOR_BYTES + k] = uchar(byte);
  }
}

TQ_FN void tq_encode(TqPlace place, TqEncodeInputs inputs, TqEncodeFigures figures, TqEncodeOutputs out,
                     TQ_SHARED TqEncodeShared& shared) {
  const TqShare mine = tq_share(place);
  const int first_row = int(place.block_x) * VECTORS, last = figures.num_pages * PAGE - 1;
  const int row = first_row + mine.vector;
  const int token = row < last ? row : last;  // surplus lanes repeat the last row: all of a block meet at its barriers
  tq_fill_tables(shared, place.tid);
  float y[PER];
  tq_centred(inputs, mine, token, figures.num_pages, shared.turned, y);
  tq_rotate(y, place.lane);

  float energy = 0.0f;
  for (int i = 0; i < PER; i++) energy += y[i] * y[i];
  energy = tq_vector_sum(energy);
  const float rms = tq_sqrt(energy / float(D));
  const float inverse = rms == 0.0f ? 1.0f : 1.0f / rms;
  if (TRELLIS) {
    for (int i = 0; i < PER; i++) shared.turned[mine.vector * TURN_PITCH + tq_turned_dim(mine, i)] = y[i] * inverse;
    tq_search_paths(place, shared.turned, shared.book, shared.trellis);
  }
  const TqCoded coded = tq_quantised(y, inverse, mine, shared);

  const int at = tq_page_row(inputs.pages[token / PAGE], mine.head, token);
  if (row <= last && mine.part == 0) out.scales[at] = Half(tq_scale_of(energy, rms, coded.c_energy, coded.inner));
  if (BASE == 1 && !TRELLIS) {
    for (int k = 0; k < UNITS; k++) {
      tq_write_unit<BITS>(out.packed + ulong(at) * VECTOR_BYTES, k * LANES + mine.part, coded.words + 2 * k, row <= last,
                          place.lane);
    }
  } else {
    TQ_BARRIER();
    if (TRELLIS) {
      tq_pack_trellis(out.packed, shared.codes, shared.trellis.branch, inputs.pages, first_row, last, mine.head, place.tid);
    } else {
      tq_pack(out.packed, shared.codes, inputs.pages, first_row, last, mine.head, place.tid);
    }
  }
}
