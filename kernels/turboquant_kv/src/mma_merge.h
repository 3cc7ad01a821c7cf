// The warps' parts become one: each busy warp's totals go to the arena, then everybody adds. Dims lie as [dim within the
// lane's eighth][eighth], so that lanes store and add without conflicts.
#pragma unroll
for (int step = 4; step < 32; step <<= 1) {
  l_0 += __shfl_xor_sync(~0u, l_0, step);
  l_1 += __shfl_xor_sync(~0u, l_1, step);
}
__syncthreads();  // nobody reads the arena any more
const int STRIDE = DV + 4;
float* sums = reinterpret_cast<float*>(arena);  // (warps, LIVE, STRIDE)
if (int(warp) < num_busy) {
  if (r == 0) {
    row_peak[int(warp) * 8 + 2 * c] = m_0;
    row_peak[int(warp) * 8 + 2 * c + 1] = m_1;
    row_mass[int(warp) * 8 + 2 * c] = l_0;
    row_mass[int(warp) * 8 + 2 * c + 1] = l_1;
  }
  float* mine = sums + (int(warp) * LIVE + 2 * c) * STRIDE + r;
#pragma unroll
  for (int j = 0; j < DV / 16; j++) {
    if (2 * c < LIVE) {
      mine[16 * j] = o[j][0];
      mine[16 * j + 8] = o[j][2];
    }
    if (2 * c + 1 < LIVE) {
      mine[STRIDE + 16 * j] = o[j][1];
      mine[STRIDE + 16 * j + 8] = o[j][3];
    }
  }
}
__syncthreads();
const ulong part = (ulong(block_z) * HEADS + block_y) * num_blocks_x + block_x;
const ulong part_stats = ulong(plan[3]) * (LIVE * DV) + part * LIVE * 2;
__shared__ float row_weight[8 * WARPS];
if (tid < 8 * WARPS) {  // a thread for each warp's row
  const int row = int(tid) & 7, w = int(tid) >> 3;
  float top = TQ_NO_PEAK;
  for (int i = 0; i < num_busy; i++) top = fmaxf(top, row_peak[i * 8 + row]);
  row_weight[tid] = w < num_busy ? tq_exp2(row_peak[w * 8 + row] - top) : 0.0f;
  if (w == 0 && row < LIVE) {
    float mass = 0.0f;
    for (int i = 0; i < num_busy; i++) mass += tq_exp2(row_peak[i * 8 + row] - top) * row_mass[i * 8 + row];
    parts[part_stats + 2 * row] = top;
    parts[part_stats + 2 * row + 1] = mass;
  }
}
__syncthreads();
for (int i = int(tid); i < LIVE * DV; i += THREADS) {
  const int row = i / DV, at = i % DV;
  float sum = 0.0f;
  for (int w = 0; w < num_busy; w++) sum += row_weight[w * 8 + row] * sums[(w * LIVE + row) * STRIDE + at];
  parts[part * (LIVE * DV) + row * DV + at % 8 * (DV / 8) + at / 8] = sum;
}
