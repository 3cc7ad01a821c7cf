// Exact rows to codes and scales (docs/codec.md): centred, rotated, divided by their root mean square, each coordinate's
// centroid found in the thresholds. Blocks: x as many rows as 128 threads have vectors, y a head. Output: pages
// (P, HEADS, PAGE).
const int BYTES = D * BITS / 8;
const int VECTORS = 128 / LANES;
const int head = int(block_y), part = int(lane) % LANES, vector = int(tid) / LANES;
const int last = figures[0] - 1;
const int row = int(block_x) * VECTORS + vector;
const int token = row < last ? row : last;  // surplus lanes repeat the last row: all of a block meet at its barriers
TQ_SHARED_ARRAY(float, book, 1 << BITS);
TQ_SHARED_ARRAY(float, limits, 1 << BITS);
TQ_SHARED_ARRAY(float, turned, BASE > 1 ? VECTORS * (D + LANES) : 4);  // LANES more: columns then meet in no bank
TQ_SHARED_ARRAY(uchar, codes, BASE > 1 ? VECTORS * D : 4);
for (int i = int(tid); i < (1 << BITS); i += 128) {
  book[i] = tq_book[i];
  limits[i] = tq_thresholds[i < (1 << BITS) - 1 ? i : 0];
}

// A lane's units, centred and with the rotation's signs.
const TQ_DEVICE In* from = rows + (head * rows_strides[0] + token * rows_strides[1]);
const bool is_wide = tq_is_wide(from, int(rows_strides[2]));
float y[PER];
for (int k = 0; k < UNITS; k++) {
  const int d = 8 * (k * LANES + part);
  if (d >= D) break;
  float x[8], sign[8], mean[8];
  if (is_wide) {
    tq_load8(from + d, x);
  } else {
    for (int i = 0; i < 8; i++) x[i] = float(from[(d + i) * rows_strides[2]]);
  }
  tq_load8(constants + d, sign);
  tq_load8(constants + ROTATION + head * D + d, mean);
  for (int i = 0; i < 8; i++) {
    const float centred = (x[i] - mean[i]) * sign[i];
    if (BASE == 1) y[8 * k + i] = centred;
    else turned[vector * (D + LANES) + d + i] = centred;
  }
}
TQ_BARRIER();
if (BASE > 1) {
  for (int i = 0; i < PER; i++) y[i] = turned[vector * (D + LANES) + i * LANES + part];
}
tq_rotate<BASE, PER, LANES>(y, lane);

float energy = 0.0f;
for (int i = 0; i < PER; i++) energy += y[i] * y[i];
energy = tq_vector_sum<LANES>(energy);
const float rms = tq_sqrt(energy / float(D));
const float inverse = rms == 0.0f ? 1.0f : 1.0f / rms;
float c_energy = 0.0f, inner = 0.0f;
uint words[BASE == 1 ? 2 * UNITS : 2];
for (int i = 0; i < (BASE == 1 ? 2 * UNITS : 2); i++) words[i] = 0;
for (int i = 0; i < PER; i++) {
  const float z = y[i] * inverse;
  uint code = 0;
  for (uint step = 1u << (BITS - 1); step > 0; step >>= 1) {
    if (z > limits[code + step - 1]) code += step;
  }
  const float c = book[code];
  c_energy += c * c;
  inner += y[i] * c;
  if (BASE == 1) words[i / 8 * 2 + (BITS == 8 ? i / 4 % 2 : 0)] |= code << (BITS * i % (BITS == 8 ? 32 : 8 * BITS));
  else codes[vector * D + i * LANES + part] = uchar(code);
}
c_energy = tq_vector_sum<LANES>(c_energy);
inner = tq_vector_sum<LANES>(inner);
float scale = rms;
if (SCALE_KIND == 1) scale = tq_sqrt(energy / c_energy);
if (SCALE_KIND == 2) scale = inner / c_energy;
if (SCALE_KIND == 3) scale = energy / (inner <= 0.0f ? 1.0f : inner);
if (rms == 0.0f) scale = 0.0f;
if (scale > 65504.0f) scale = 65504.0f;

const int at = ((row / PAGE) * HEADS + head) * PAGE + row % PAGE;
if (row <= last && part == 0) scales[at] = Half(scale);
if (BASE == 1) {
  for (int k = 0; k < UNITS; k++) {
    tq_write_unit<BITS>(packed + ulong(at) * BYTES, k * LANES + part, words + 2 * k, row <= last, lane);
  }
} else {
  TQ_BARRIER();
  for (int i = int(tid); i < VECTORS * BYTES; i += 128) {  // threads write neighbours
    const int mine = i / BYTES, k = i % BYTES, to = int(block_x) * VECTORS + mine;
    uint byte = 0;
    for (int d = 8 * k / BITS; d * BITS < 8 * k + 8; d++) {
      const uint code = codes[mine * D + d];
      const int shift = d * BITS - 8 * k;
      byte |= shift >= 0 ? code << shift : code >> -shift;
    }
    if (to <= last) packed[ulong(((to / PAGE) * HEADS + head) * PAGE + to % PAGE) * BYTES + k] = uchar(byte);
  }
}
