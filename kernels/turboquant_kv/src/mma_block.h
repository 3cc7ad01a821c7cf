// What the tensor-core decode kernel's files share: sizes, a block's shared memory, and the lane's rows of output.
//
// Dynamic shared memory (tq_arena) is laid out by backends/gpu/arena.py, whose offsets are constants here: K_TABLE,
// K_HIGH_TABLE, V_TABLE, V_HIGH_TABLE, QUERIES_AT, RINGS_AT, and within a tile V_AT, V_BLOCK_BYTES, SCALES_AT.
#pragma once
#include "fragments_cuda.h"
#include "append.h"
#include "softmax.h"

constexpr int THREADS = 32 * WARPS;
constexpr int K_BYTES = D * KBITS / 8;
constexpr int V_BYTES = DV * VBITS / 8;
constexpr int UNITS = TILE / 16;
constexpr int BLOCK_TOKENS = TILE / 4;

// Beside the arena: q . mean_k of the block's rows, and each warp's softmax of them.
struct TqMmaShared {
  ulong barriers[BULK ? WARPS * STAGES : 1];  // of the warps' rings
  float mean[8];
  float peak[8 * WARPS], mass[8 * WARPS], weight[8 * WARPS];
  float compressed[8], all[8];  // masses of output rows: of compressed tokens, of everything
  int num_arrived;              // blocks of the row group that have written their parts
};

// The running softmax of a lane's two query rows, 2c and 2c + 1, over the tokens that its warp has seen. Peaks are those of
// the warp, masses the lane's share. o: sums of values times weights, V^T (16 dims) . P^T (8 rows) a fragment.
struct TqMmaRows {
  float peak[2], mass[2], o[DV / 16][4];
};

TQ_FN void tq_start(TqMmaRows& rows) {
#pragma unroll
  for (int j = 0; j < DV / 16; j++) rows.o[j][0] = rows.o[j][1] = rows.o[j][2] = rows.o[j][3] = 0.0f;
  rows.peak[0] = rows.peak[1] = TQ_NO_PEAK;
  rows.mass[0] = rows.mass[1] = 0.0f;
}

// What was summed before fades towards new peaks.
TQ_FN void tq_fade(TqMmaRows& rows, float peak_0, float peak_1) {
  const float fade_0 = tq_exp2(rows.peak[0] - peak_0), fade_1 = tq_exp2(rows.peak[1] - peak_1);
  rows.peak[0] = peak_0;
  rows.peak[1] = peak_1;
  rows.mass[0] *= fade_0;
  rows.mass[1] *= fade_1;
#pragma unroll
  for (int j = 0; j < DV / 16; j++) {
    rows.o[j][0] *= fade_0;
    rows.o[j][1] *= fade_1;
    rows.o[j][2] *= fade_0;
    rows.o[j][3] *= fade_1;
  }
}

// The rows' peaks over the whole warp, from the lane's own; nothing fades unless one of the warp's rose.
TQ_FN void tq_raise(TqMmaRows& rows, float peak_0, float peak_1) {
#pragma unroll
  for (int step = 4; step < 32; step <<= 1) {
    peak_0 = fmaxf(peak_0, __shfl_xor_sync(~0u, peak_0, step));
    peak_1 = fmaxf(peak_1, __shfl_xor_sync(~0u, peak_1, step));
  }
  if (__any_sync(~0u, peak_0 > rows.peak[0] || peak_1 > rows.peak[1])) tq_fade(rows, peak_0, peak_1);
}

// Scores of a fragment (rows of tokens, two query columns a lane) to weights.
TQ_FN void tq_weigh(TqMmaRows& rows, float* s) {
  s[0] = tq_exp2(s[0] - rows.peak[0]);
  s[1] = tq_exp2(s[1] - rows.peak[1]);
  s[2] = tq_exp2(s[2] - rows.peak[0]);
  s[3] = tq_exp2(s[3] - rows.peak[1]);
  rows.mass[0] += s[0] + s[2];
  rows.mass[1] += s[1] + s[3];
}

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
