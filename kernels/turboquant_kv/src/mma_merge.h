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
for (int row = int(warp); row < LIVE; row += WARPS) {  // a warp a row, a lane a warp's part
  const bool busy = int(lane) < num_busy;
  const float peak = busy ? row_peak[lane * 8 + row] : TQ_NO_PEAK;
  const float top = tq_lane_max(peak), weight = busy ? tq_exp2(peak - top) : 0.0f;
  const float mass = tq_lane_sum(busy ? weight * row_mass[lane * 8 + row] : 0.0f);
  if (busy) row_weight[lane * 8 + row] = weight;
  if (lane == 0) *reinterpret_cast<float2*>(parts + part_stats + 2 * row) = make_float2(top, mass);
}
__syncthreads();
#pragma unroll
for (int k = 0; k < (LIVE * DV + THREADS - 1) / THREADS; k++) {
  const int i = int(tid) + k * THREADS, row = i / DV, at = i % DV;
  if (i >= LIVE * DV) break;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    if (w < num_busy) sum += row_weight[w * 8 + row] * sums[(w * LIVE + row) * STRIDE + at];
  }
  parts[part * (LIVE * DV) + row * DV + at % 8 * (DV / 8) + at / 8] = sum;
}
