// What all kernels share: where a thread stands, exact values eight at a time, the Hadamard butterfly.
//
// A kernel's text is the prelude, the constants of a shape, then its file of src/ with what that includes. Constants
// (names in capitals: D, PAGE, HEADS ...) and the types In, Out and Exact are named where they are used and written by
// Python (source.py); each is one value in all files of a text.
#pragma once

// An input that is written in place: pages and exact rows are too large to be made anew in every step. MLX sees inputs that
// never change, so whoever launches such a kernel orders it before and after others by an output of its own (backend.py).
#define TQ_WRITABLE(type, input) ((TQ_DEVICE type*)(input))

// A thread in its block, and the block in the grid.
struct TqPlace {
  uint tid, lane, warp;
  uint block_x, block_y, block_z, num_blocks_x;
};

TQ_FN constexpr bool tq_is_power_of_two(int n) { return (n & (n - 1)) == 0; }
TQ_FN constexpr int tq_larger(int a, int b) { return a > b ? a : b; }

// Eight consecutive exact values; prelude_cuda.h has wider reads and writes.
template <typename T>
TQ_FN void tq_load8(const TQ_DEVICE T* p, TQ_THREAD float* out) {
  for (int i = 0; i < 8; i++) out[i] = float(p[i]);
}
template <typename T>
TQ_FN void tq_store8(TQ_DEVICE T* p, const TQ_THREAD float* x) {
  for (int i = 0; i < 8; i++) p[i] = T(x[i]);
}

// In-place Sylvester-Hadamard transform of num_rows vectors of dim (a power of two) in shared memory, by a whole block.
TQ_FN void tq_hadamard(TQ_SHARED float* rows, int num_rows, int dim, uint tid, uint num_threads) {
  for (int width = 1; width < dim; width *= 2) {
    TQ_BARRIER();
    for (int i = int(tid); i < num_rows * dim / 2; i += int(num_threads)) {
      const int low = 2 * i - (i & (width - 1));  // rows are whole multiples of 2 * width: they need no index of their own
      const float a = rows[low], b = rows[low + width];
      rows[low] = a + b;
      rows[low + width] = a - b;
    }
  }
  TQ_BARRIER();
}

// The butterfly over the PER values that a lane holds itself.
template <int PER>
TQ_FN void tq_own_hadamard(TQ_THREAD float* x) {
#pragma unroll
  for (int width = 1; width < PER; width *= 2) {
#pragma unroll
    for (int i = 0; i < PER; i++) {
      if (i & width) continue;
      const float a = x[i], b = x[i + width];
      x[i] = a + b;
      x[i + width] = a - b;
    }
  }
}

// The whole transform of a vector over a warp's 32 lanes, each holding PER of it, lane * PER + i or lane + 32 * i being
// the index: the order of an index's bits does not matter to it.
template <int PER>
TQ_FN void tq_lane_hadamard(TQ_THREAD float* x, uint lane) {
  tq_own_hadamard<PER>(x);
#pragma unroll
  for (uint mask = 1; mask < 32; mask *= 2) {
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const float other = tq_shuffle_xor(x[i], mask);
      x[i] = lane & mask ? other - x[i] : x[i] + other;
    }
  }
}
