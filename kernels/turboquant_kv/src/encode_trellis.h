// The path of least squared error through the trellis: Viterbi's algorithm, eight lanes a vector, each a state, which is
// the last three branch bits, the newest in bit 0. State t is reached from t / 2 and t / 2 + 4, by branch t % 2.
// Sums are float32, ties fall as in trellis_reference.py.
#pragma once
#include "pages.h"

TQ_CONSTANT int SUBSET_LEVELS = TRELLIS != 0 ? LEVELS / 4 : 1;  // level s + 4i is level i of subset s
TQ_CONSTANT int CAME_WORDS = (D + 31) / 32;  // a bit a coordinate
TQ_CONSTANT int BLOCKS = D / 16;

struct TqTrellisShared {
  uint came[TRELLIS ? VECTORS * CAME_WORDS * 8 : 1];  // of each vector and state: whether it was reached from the higher one
  ushort branch[TRELLIS ? VECTORS * BLOCKS : 1];      // packed
};

// The squared error of a subset's nearest level.
TQ_FN float tq_subset_error(float z, const TQ_THREAD float* levels) {
  float least = (z - levels[0]) * (z - levels[0]);
#pragma unroll
  for (int i = 1; i < SUBSET_LEVELS; i++) {
    const float error = (z - levels[i]) * (z - levels[i]);
    if (error < least) least = error;
  }
  return least;
}

// Costs of a vector's paths, coordinate by coordinate; returns the last state of the best one. z in shared memory.
TQ_FN int tq_walk_forward(const TQ_SHARED float* z, const TQ_SHARED float* book, TQ_SHARED uint* came, uint lane) {
  const uint state = lane % 8, low = lane - state + state / 2;
  const int subset = int(2 * ((state & 1) ^ (state >> 2)) + (state >> 1 & 1));
  float low_levels[SUBSET_LEVELS], high_levels[SUBSET_LEVELS];
#pragma unroll
  for (int i = 0; i < SUBSET_LEVELS; i++) {
    low_levels[i] = book[4 * i + subset];
    high_levels[i] = book[4 * i + (subset ^ 2)];
  }
  float cost = state == 0 ? 0.0f : 1e30f;
  for (int first = 0; first < D; first += 32) {
    uint bits = 0;
    const int count = D - first < 32 ? D - first : 32;
    for (int i = 0; i < count; i++) {
      const float x = z[first + i];
      const float by_low = tq_shuffle(cost, low) + tq_subset_error(x, low_levels);
      const float by_high = tq_shuffle(cost, low + 4) + tq_subset_error(x, high_levels);
      if (by_high < by_low) bits |= 1u << i;
      cost = by_high < by_low ? by_high : by_low;
    }
    came[first / 32 * 8 + int(state)] = bits;
  }
  int best = 0;
  float least = tq_shuffle(cost, lane - state);
  for (uint i = 1; i < 8; i++) {
    const float other = tq_shuffle(cost, lane - state + i);
    if (other < least) {
      least = other;
      best = int(i);
    }
  }
  return best;
}

// The path back from its last state, as a packed plane of branch bits.
TQ_FN void tq_walk_back(int state, const TQ_SHARED uint* came, TQ_SHARED ushort* branch) {
  for (int block = BLOCKS - 1; block >= 0; block--) {
    uint packed = 0;
    for (int k = 15; k >= 0; k--) {
      const int d = 16 * block + k;
      packed |= uint(state & 1) << (2 * (k & 7) + (k >> 3));
      state = (state >> 1) + int(came[d / 32 * 8 + state] >> (d & 31) & 1) * 4;
    }
    branch[block] = ushort(packed);
  }
}

// The paths of a block's vectors, whose coordinates z (of unit variance) lie TURN_PITCH apart. A whole block meets here.
TQ_FN void tq_search_paths(TqPlace place, const TQ_SHARED float* z, const TQ_SHARED float* book,
                           TQ_SHARED TqTrellisShared& trellis) {
  TQ_BARRIER();
  for (int vector = int(place.tid) / 8; vector < VECTORS; vector += PAGE_THREADS / 8) {  // of a warp all or none
    TQ_SHARED uint* came = trellis.came + vector * CAME_WORDS * 8;
    const int last = tq_walk_forward(z + vector * TURN_PITCH, book, came, place.lane);
    TQ_WARP_BARRIER();
    if (place.lane % 8 == 0) tq_walk_back(last, came, trellis.branch + vector * BLOCKS);
  }
  TQ_BARRIER();
}

// The level of coordinate d: of the subset that the path allows, the nearest to z.
TQ_FN uint tq_level_on_path(const TQ_SHARED ushort* branch, int d, float z, const TQ_SHARED float* limits) {
  const int block = d / 16;
  const uint before = block > 0 ? tq_fields(branch[block - 1]) : 0u;
  const uint subset = tq_subsets(before, tq_fields(branch[block])) >> (2 * (d % 16)) & 3;
  uint level = subset;
  for (int i = 0; i + 1 < SUBSET_LEVELS; i++) {
    if (z > limits[int(subset) * SUBSET_LEVELS + i]) level += 4;
  }
  return level;
}

// The planes of a block's vectors, 16 bits a thread; own: of each coordinate.
TQ_FN void tq_pack_trellis(TQ_DEVICE uchar* packed, const TQ_SHARED uchar* own, const TQ_SHARED ushort* branch,
                           const TQ_DEVICE int* page_ids, int first_row, int last, int head, uint tid) {
  for (int i = int(tid); i < VECTORS * VECTOR_BYTES / 2; i += PAGE_THREADS) {
    const int vector = i / (VECTOR_BYTES / 2), k = i % (VECTOR_BYTES / 2), row = first_row + vector;
    uint word = branch[vector * BLOCKS + (k < BLOCKS ? k : 0)];
    if (k >= BLOCKS && BITS > 2 && k < 3 * BLOCKS) {
      const TQ_SHARED uchar* from = own + vector * D + (k - BLOCKS) * 8;
      word = 0;
      for (int j = 0; j < 8; j++) word |= uint(from[j] & 3) << (2 * j);
    } else if (k >= BLOCKS) {  // one bit a coordinate: the only own bit, or the top one
      const TQ_SHARED uchar* from = own + vector * D + (k - (BITS - 1) * BLOCKS) * 16;
      word = 0;
      for (int j = 0; j < 8; j++) {
        word |= uint(from[j] >> (BITS - 2)) << (2 * j) | uint(from[j + 8] >> (BITS - 2)) << (2 * j + 1);
      }
    }
    if (row > last) continue;
    TQ_DEVICE uchar* to = packed + ulong(tq_page_row(page_ids[row / PAGE], head, row)) * VECTOR_BYTES;
    reinterpret_cast<TQ_DEVICE ushort*>(to)[k] = ushort(word);
  }
}
