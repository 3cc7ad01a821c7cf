// The warps' parts become one: each warp's totals go to the arena, then everybody adds. Dims lie as [dim within the
// lane's eighth][eighth], so that lanes store without conflicts.
#pragma unroll
for (int step = 4; step < 32; step <<= 1) {
  l_0 += __shfl_xor_sync(~0u, l_0, step);
  l_1 += __shfl_xor_sync(~0u, l_1, step);
}
__syncthreads();  // nobody reads the arena any more
if (r == 0) {
  row_peak[int(warp) * 8 + 2 * c] = m_0;
  row_peak[int(warp) * 8 + 2 * c + 1] = m_1;
  row_mass[int(warp) * 8 + 2 * c] = l_0;
  row_mass[int(warp) * 8 + 2 * c + 1] = l_1;
}
const int STRIDE = DV + 4;
float* sums = reinterpret_cast<float*>(arena);
float* mine = sums + (int(warp) * 8 + 2 * c) * STRIDE + r;
#pragma unroll
for (int j = 0; j < DV / 16; j++) {
  mine[16 * j] = o[j][0];
  mine[STRIDE + 16 * j] = o[j][1];
  mine[16 * j + 8] = o[j][2];
  mine[STRIDE + 16 * j + 8] = o[j][3];
}
__syncthreads();
const ulong part = (ulong(block_z) * HEADS + block_y) * num_blocks_x + block_x;
for (int row = int(warp); row < LIVE; row += WARPS) {
  float top = TQ_NO_PEAK, mass = 0.0f, weights[WARPS];
#pragma unroll
  for (int w = 0; w < WARPS; w++) top = fmaxf(top, row_peak[w * 8 + row]);
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    weights[w] = tq_exp2(row_peak[w * 8 + row] - top);
    mass += weights[w] * row_mass[w * 8 + row];
  }
#pragma unroll
  for (int i = 0; i < DV / 32; i++) {
    const int d = i * 32 + int(lane);
    const int at = row * STRIDE + (d % (DV / 8)) * 8 + d / (DV / 8);
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += weights[w] * sums[w * 8 * STRIDE + at];
    parts[part * (LIVE * DV) + row * DV + d] = sum;
  }
  if (lane == 0) {
    const ulong at = ulong(plan[3]) * (LIVE * DV) + (part * LIVE + row) * 2;
    parts[at] = top;
    parts[at + 1] = mass;
  }
}
