// A dense rotation by a whole block, for dims that are no power of two.
#pragma once
#include "common.h"

// Rows (NUM, D) in shared memory times a matrix (D, D) in device memory, a warp its share of the matrix's rows, so that
// all of it is asked for at once: partial sums (WARPS, NUM, D), to be added after a barrier.
template <int NUM, int D, int WARPS>
TQ_FN void tq_rotate_densely(const float* rows, const float* matrix, float* partial, uint warp, uint lane) {
  const int PER = (D + 31) / 32, SHARE = (D + WARPS - 1) / WARPS;
  float sum[NUM][PER];
#pragma unroll
  for (int row = 0; row < NUM; row++) {
#pragma unroll
    for (int e = 0; e < PER; e++) sum[row][e] = 0.0f;
  }
#pragma unroll 8
  for (int k = 0; k < SHARE; k++) {
    const int i = int(warp) * SHARE + k;
    float x[PER];
#pragma unroll
    for (int e = 0; e < PER; e++) x[e] = i < D && int(lane) + 32 * e < D ? matrix[i * D + lane + 32 * e] : 0.0f;
#pragma unroll
    for (int row = 0; row < NUM; row++) {
      const float y = i < D ? rows[row * D + i] : 0.0f;
#pragma unroll
      for (int e = 0; e < PER; e++) sum[row][e] += y * x[e];
    }
  }
#pragma unroll
  for (int row = 0; row < NUM; row++) {
#pragma unroll
    for (int e = 0; e < PER; e++) {
      if (int(lane) + 32 * e < D) partial[(warp * NUM + row) * D + lane + 32 * e] = sum[row][e];
    }
  }
}
template <int NUM, int D, int WARPS>
TQ_FN float tq_partial_sum(const float* partial, int i) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += partial[w * NUM * D + i];
  return sum;
}
