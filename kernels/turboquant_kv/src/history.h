// One side of a sequence's history in the model's basis and dtype, (HEADS, columns, D): sink rows as they are, pages
// decoded, window rows as they are. Blocks: x ROUNDS times as many columns as 128 threads have vectors, y a head.
// figures: columns, sink rows, compressed tokens.
const int BYTES = D * BITS / 8;
const int VECTORS = 128 / LANES;
const int head = int(block_y), part = int(lane) % LANES, vector = int(tid) / LANES;
const int num_columns = figures[0], num_sink = figures[1], num_tokens = figures[2];
const int first = int(block_x) * VECTORS * ROUNDS;
TQ_SHARED_ARRAY(float, book, 1 << BITS);
TQ_SHARED_ARRAY(float, turned, BASE > 1 ? VECTORS * (D + LANES) : 4);  // LANES more: columns then meet in no bank
for (int i = int(tid); i < (1 << BITS); i += 128) book[i] = tq_book[i];
TQ_BARRIER();

if (first < num_sink + num_tokens && first + VECTORS * ROUNDS > num_sink) {
  // All rounds' codes are asked for before the first are used: memory answers late.
  uint words[ROUNDS * UNITS * 2];
  float scale[ROUNDS];
  const TQ_DEVICE uchar* coded = codes;
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    const int token = first + round * VECTORS + vector - num_sink;
    scale[round] = 0.0f;
    for (int i = 0; i < UNITS * 2; i++) words[round * UNITS * 2 + i] = 0;
    if (token >= 0 && token < num_tokens) {
      const ulong at = ulong(page_ids[token / PAGE] * HEADS + head) * PAGE + token % PAGE;
      coded = codes + at * BYTES;
      scale[round] = float(scales[at]);
      if (BASE == 1) {
        for (int k = 0; k < UNITS; k++) {
          tq_read_unit<BITS>(coded, k * LANES + part, words + (round * UNITS + k) * 2);
        }
      }
    }
  }
  float sign[UNITS * 8], mean[UNITS * 8];
  for (int k = 0; k < UNITS; k++) {
    const int d = 8 * (k * LANES + part);
    if (d >= D) break;
    tq_load8(constants + d, sign + 8 * k);
    tq_load8(constants + ROTATION + head * D + d, mean + 8 * k);
  }
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    const int column = first + round * VECTORS + vector, token = column - num_sink;
    const bool is_coded = token >= 0 && token < num_tokens;
    float y[PER];
    for (int i = 0; i < PER; i++) {
      const uint word = words[(round * UNITS + (BASE == 1 ? i / 8 : 0)) * 2 + (BITS == 8 ? i / 4 % 2 : 0)];
      uint code = (word >> (BITS * i % (BITS == 8 ? 32 : 8 * BITS))) & ((1u << BITS) - 1);
      if (BASE > 1) code = is_coded ? tq_code_of<BITS>(coded, i * LANES + part) : 0;
      y[i] = book[code];
    }
    tq_rotate<BASE, PER, LANES>(y, lane);
    if (BASE > 1) {
      for (int i = 0; i < PER; i++) turned[vector * (D + LANES) + i * LANES + part] = y[i];
      TQ_BARRIER();
    }
    for (int k = 0; k < UNITS; k++) {
      const int d = 8 * (k * LANES + part);
      if (d >= D || !is_coded) break;
      float x[8];
      for (int i = 0; i < 8; i++) {
        const float rotated = BASE == 1 ? y[8 * k + i] : turned[vector * (D + LANES) + d + i];
        x[i] = rotated * (sign[8 * k + i] * scale[round]) + mean[8 * k + i];
      }
      tq_store8(history + ((ulong(head) * num_columns + column) * D + d), x);
    }
  }
}

for (int round = 0; round < ROUNDS; round++) {
  const int column = first + round * VECTORS + vector, token = column - num_sink;
  if (column >= num_columns || (token >= 0 && token < num_tokens)) continue;
  const TQ_DEVICE Exact* from = token < 0
      ? sink + (head * sink_strides[0] + column * sink_strides[1])
      : window + (head * window_strides[0] + (token - num_tokens) * window_strides[1]);
  const int stride = int(token < 0 ? sink_strides[2] : window_strides[2]);
  const bool is_wide = tq_is_wide(from, stride);
  for (int d = 8 * part; d < D; d += 8 * LANES) {
    float x[8];
    if (is_wide) {
      tq_load8(from + d, x);
    } else {
      for (int i = 0; i < 8; i++) x[i] = float(from[(d + i) * stride]);
    }
    tq_store8(history + ((ulong(head) * num_columns + column) * D + d), x);
  }
}
