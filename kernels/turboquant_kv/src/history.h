// One side of a sequence's history in the model's basis and dtype, (HEADS, columns, D): sink rows as they are, pages
// decoded, window rows as they are. A warp a vector. figures: columns, sink rows, compressed tokens.
const int PER = D / 32;
const int BYTES = D * BITS / 8;
const int head = int(block_y);
const int column = int(block_x) * 4 + int(warp);
const int num_columns = figures[0], num_sink = figures[1], num_tokens = figures[2];
TQ_SHARED_ARRAY(float, book, 1 << BITS);
for (int i = int(tid); i < (1 << BITS); i += 128) book[i] = tq_book[i];
TQ_BARRIER();
if (column < num_columns) {
  TQ_DEVICE Exact* to = history + (ulong(head) * num_columns + column) * D;
  const int token = column - num_sink;
  if (token >= 0 && token < num_tokens) {
    const ulong at = ulong(page_ids[token / PAGE] * HEADS + head) * PAGE + token % PAGE;
    const TQ_DEVICE uchar* vector = codes + at * BYTES;
    const float scale = float(scales[at]);
    float y[PER];
    for (int i = 0; i < PER; i += 2) {
      float pair[2];
      tq_pair<BITS>(vector, lane * PER + i, book, pair);
      y[i] = pair[0] * scale;
      y[i + 1] = pair[1] * scale;
    }
    tq_lane_hadamard<PER>(y, lane);
    for (int i = 0; i < PER; i++) {
      const int d = int(lane) * PER + i;
      to[d] = Exact(y[i] * constants[d] + constants[ROTATION + head * D + d]);
    }
  } else {
    const TQ_DEVICE Exact* from = token < 0
        ? sink + (head * sink_strides[0] + column * sink_strides[1])
        : window + (head * window_strides[0] + (token - num_tokens) * window_strides[1]);
    for (int d = int(lane); d < D; d += 32) to[d] = from[d];
  }
}
