// Exact rows to codes and scales (docs/codec.md), a warp a vector: centred, rotated, divided by its root mean square,
// each coordinate's centroid found in the thresholds. Blocks: x four rows, y a head. Output: pages (P, HEADS, PAGE).
const int PER = D / 32;
const int BYTES = D * BITS / 8;
const int head = int(block_y);
const int last = figures[0] - 1;
const int row = int(block_x) * 4 + int(warp);
const int token = row < last ? row : last;  // surplus warps repeat the last row: all of a block meet at its barriers
TQ_SHARED_ARRAY(uchar, codes_of, 4 * D);

const TQ_DEVICE In* from = rows + (head * rows_strides[0] + token * rows_strides[1]);
float y[PER], energy = 0.0f;
for (int i = 0; i < PER; i++) {
  const int d = int(lane) * PER + i;
  y[i] = (float(from[d * rows_strides[2]]) - constants[ROTATION + head * D + d]) * constants[d];
}
tq_lane_hadamard<PER>(y, lane);
for (int i = 0; i < PER; i++) energy += y[i] * y[i];
energy = tq_lane_sum(energy);
const float rms = tq_sqrt(energy / float(D));
const float inverse = rms == 0.0f ? 1.0f : 1.0f / rms;
float c_energy = 0.0f, inner = 0.0f;
for (int i = 0; i < PER; i++) {
  const float z = y[i] * inverse;
  int code = 0;
  for (int step = 1 << (BITS - 1); step > 0; step >>= 1) {
    if (z > tq_thresholds[code + step - 1]) code += step;
  }
  const float c = tq_book[code];
  c_energy += c * c;
  inner += y[i] * c;
  codes_of[warp * D + lane * PER + i] = uchar(code);
}
c_energy = tq_lane_sum(c_energy);
inner = tq_lane_sum(inner);
float scale = rms;
if (SCALE_KIND == 1) scale = tq_sqrt(energy / c_energy);
if (SCALE_KIND == 2) scale = inner / c_energy;
if (SCALE_KIND == 3) scale = energy / (inner <= 0.0f ? 1.0f : inner);
if (rms == 0.0f) scale = 0.0f;
if (scale > 65504.0f) scale = 65504.0f;
TQ_BARRIER();
if (row <= last) {
  const int at = ((row / PAGE) * HEADS + head) * PAGE + row % PAGE;
  for (int k = int(lane); k < BYTES; k += 32) {
    uint byte = 0;
    for (int i = 8 * k / BITS; i * BITS < 8 * k + 8; i++) {
      const uint code = codes_of[warp * D + i];
      const int shift = i * BITS - 8 * k;
      byte |= shift >= 0 ? code << shift : code >> -shift;
    }
    packed[ulong(at) * BYTES + k] = uchar(byte);
  }
  if (lane == 0) scales[at] = Half(scale);
}
