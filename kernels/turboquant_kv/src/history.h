// One side of sequences' histories in the model's basis and dtype: sink rows as they are, pages decoded, window rows as
// they are. Blocks: x ROUNDS times as many columns as PAGE_THREADS threads have vectors, y a head, z a sequence.
//
//   columns  0 .. num_sink | .. + num_tokens | .. num_columns
//   hold     sink          | pages, decoded  | window
//
// A head's columns are rows of D where TILE is 1. Else they are tiles of TILE columns, the last one filled with zeros, as
// instructions_hopper.h wants them: blocks of 64 dims, in each of which a column is 128 bytes, its piece of 16 bytes at
// its number XOR the column's low three bits.
#pragma once
#include "pages.h"

TQ_FN int tq_places(TqHistoryFigures figures) { return (figures.num_columns + TILE - 1) / TILE * TILE; }

// Where eight dims of a column begin.
TQ_FN ulong tq_place_of(TqHistoryFigures figures, int head, int column, int d) {
  const ulong first = ulong(head) * tq_places(figures);
  if (TILE == 1) return (first + column) * D + d;
  const int at = column % TILE, piece = (d / 8 % 8) ^ (at & 7);
  return (first + column - at) * D + (d / 64 * TILE + at) * 64 + 8 * piece;
}

// codes and scales of all pages; page_ids: of all sequences, where TqHistoryFigures says; exact rows (HEADS, rows, D),
// strided; constants: signs / sqrt(D) (D,), then means (HEADS, D).
struct TqHistoryInputs {
  const TQ_DEVICE uchar* codes;
  const TQ_DEVICE Half* scales;
  const TQ_DEVICE int* page_ids;
  const TQ_DEVICE Exact* sink;
  long sink_strides[3];
  const TQ_DEVICE Exact* window;
  long window_strides[3];
  const TQ_DEVICE float* constants;
  const TQ_DEVICE float* turns;  // of turning.h
};

struct TqHistoryShared {
  float book[LEVELS];
  float turned[BASE > 1 ? VECTORS * TURN_PITCH : 4];  // columns on their way to rows
};

// What a lane has asked for of ROUNDS vectors: its units' words and the scales; of columns, the vector itself.
struct TqAsked {
  uint words[ROUNDS * UNITS * 2];
  float scale[ROUNDS];
  const TQ_DEVICE uchar* vector;
};

// All rounds' codes are asked for before the first are used: memory answers late.
TQ_FN void tq_ask(TQ_THREAD TqAsked& asked, TqHistoryInputs inputs, TqHistoryFigures figures, TqShare mine, int first) {
  asked.vector = inputs.codes;
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    const int token = first + round * VECTORS + mine.vector - figures.num_sink;
    asked.scale[round] = 0.0f;
    for (int i = 0; i < UNITS * 2; i++) asked.words[round * UNITS * 2 + i] = 0;
    if (token >= 0 && token < figures.num_tokens) {
      const ulong at = ulong(inputs.page_ids[token / PAGE] * HEADS + mine.head) * PAGE + token % PAGE;
      asked.vector = inputs.codes + at * VECTOR_BYTES;
      asked.scale[round] = float(inputs.scales[at]);
      if (BASE == 1) {
        for (int k = 0; k < UNITS; k++) {
          TQ_THREAD uint* words = asked.words + (round * UNITS + k) * 2;
          if (TRELLIS) {
            const TqTrellisUnit unit = tq_trellis_unit<D, BITS>(asked.vector, k * LANES + mine.part);
            words[0] = unit.levels;
            words[1] = unit.top;
          } else {
            tq_read_unit<BITS>(asked.vector, k * LANES + mine.part, words);
          }
        }
      }
    }
  }
}

// A lane's centroids of one round, still rotated.
TQ_FN void tq_centroids(const TQ_THREAD TqAsked& asked, int round, bool is_coded, int part, const TQ_SHARED float* book,
                        TQ_THREAD float* y) {
  for (int i = 0; i < PER; i++) {
    const int d = i * LANES + part;  // of a column
    uint code = 0;
    if (TRELLIS) {
      const TQ_THREAD uint* words = asked.words + (round * UNITS + i / 8) * 2;
      if (BASE == 1) code = tq_trellis_level({words[0], words[1]}, i % 8);
      else if (is_coded) code = tq_trellis_level(tq_trellis_unit<D, BITS>(asked.vector, d / 8), d % 8);
    } else if (BASE == 1) {
      const uint word = asked.words[round * UNITS * 2 + tq_word_of_code<BITS>(i)];
      code = (word >> tq_shift_of_code<BITS>(i)) & ((1u << BITS) - 1);
    } else if (is_coded) {
      code = tq_code_of<BITS>(asked.vector, d);
    }
    y[i] = book[code];
  }
}

// The compressed tokens of a block's columns from `first` on. A whole block meets here.
TQ_FN void tq_decode_columns(TqPlace place, TqHistoryInputs inputs, TqHistoryFigures figures, int first,
                             TQ_DEVICE Exact* history, TQ_SHARED TqHistoryShared& shared) {
  const TqShare mine = tq_share(place);
  TqAsked asked;
  tq_ask(asked, inputs, figures, mine, first);
  const TQ_DEVICE float* means = inputs.constants + D + mine.head * D;
  float sign[UNITS * 8], mean[UNITS * 8];
  for (int k = 0; k < UNITS; k++) {
    const int d = 8 * (k * LANES + mine.part);
    if (d >= D) break;
    tq_load8(inputs.constants + d, sign + 8 * k);
    if (TURN_PAIRS == 0) tq_load8(means + d, mean + 8 * k);
  }
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    const int column = first + round * VECTORS + mine.vector, token = column - figures.num_sink;
    const bool is_coded = token >= 0 && token < figures.num_tokens;
    TQ_SHARED float* turned = shared.turned + mine.vector * TURN_PITCH;
    float y[PER];
    tq_centroids(asked, round, is_coded, mine.part, shared.book, y);
    tq_rotate(y, place.lane);
    if (BASE > 1) {
      for (int i = 0; i < PER; i++) turned[i * LANES + mine.part] = y[i];
      TQ_BARRIER();
    }
    for (int k = 0; k < UNITS; k++) {
      const int d = 8 * (k * LANES + mine.part);
      if (d >= D || !is_coded) break;
      if (TURN_PAIRS > 0) tq_mean8(means, inputs.turns, token, d, mean + 8 * k);
      float x[8];
      for (int i = 0; i < 8; i++) {
        const float rotated = BASE == 1 ? y[8 * k + i] : turned[d + i];
        x[i] = rotated * (sign[8 * k + i] * asked.scale[round]) + mean[8 * k + i];
      }
      tq_store8(history + tq_place_of(figures, mine.head, column, d), x);
    }
  }
}

// Sink and window rows of a block's columns from `first` on, and the zeros behind them.
TQ_FN void tq_copy_exact(TqShare mine, TqHistoryInputs inputs, TqHistoryFigures figures, int first,
                         TQ_DEVICE Exact* history) {
  for (int round = 0; round < ROUNDS; round++) {
    const int column = first + round * VECTORS + mine.vector, token = column - figures.num_sink;
    if (column >= tq_places(figures) || (token >= 0 && token < figures.num_tokens)) continue;
    if (TILE > 1 && column >= figures.num_columns) {
      const float zeros[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      for (int d = 8 * mine.part; d < D; d += 8 * LANES) {
        tq_store8(history + tq_place_of(figures, mine.head, column, d), zeros);
      }
      continue;
    }
    const TQ_DEVICE Exact* from = token < 0
        ? inputs.sink + (mine.head * inputs.sink_strides[0] + (figures.sink_first + column) * inputs.sink_strides[1])
        : inputs.window +
            (mine.head * inputs.window_strides[0] +
             (figures.window_first + token - figures.num_tokens) * inputs.window_strides[1]);
    const int stride = int(token < 0 ? inputs.sink_strides[2] : inputs.window_strides[2]);
    const bool is_wide = tq_is_wide(from, stride);
    for (int d = 8 * mine.part; d < D; d += 8 * LANES) {
      float x[8];
      tq_read_row(from, stride, is_wide, d, x);
      tq_store8(history + tq_place_of(figures, mine.head, column, d), x);
    }
  }
}

// all_figures: TqHistoryFigures of each sequence. history: rows of D, of each sequence HEADS times its tq_places from its
// first_row on.
TQ_FN void tq_history(TqPlace place, TqHistoryInputs inputs, const TQ_DEVICE int* all_figures, TQ_DEVICE Exact* history,
                      TQ_SHARED TqHistoryShared& shared) {
  const TqHistoryFigures figures = tq_history_figures(all_figures + place.block_z * HISTORY_WORDS);
  const int first = int(place.block_x) * VECTORS * ROUNDS;
  if (first >= tq_places(figures)) return;  // of a shorter sequence than the longest
  inputs.page_ids += figures.first_page_id;
  history += ulong(figures.first_row) * D;
  for (int i = int(place.tid); i < LEVELS; i += PAGE_THREADS) shared.book[i] = tq_book[i];
  TQ_BARRIER();
  if (first < figures.num_sink + figures.num_tokens && first + VECTORS * ROUNDS > figures.num_sink) {
    tq_decode_columns(place, inputs, figures, first, history, shared);
  }
  tq_copy_exact(tq_share(place), inputs, figures, first, history);
}
