// A decode step's own keys and values, written to where the exact rows of their sequences end.
#pragma once
#include "balance.h"

// A decode step's new keys and values (B, HEADS, 1, dims), strided, which become each sequence's last exact row.
struct TqNewRows {
  const TQ_DEVICE Exact* k;
  long k_sequence_stride, k_head_stride, k_dim_stride;
  const TQ_DEVICE Exact* v;
  long v_sequence_stride, v_head_stride, v_dim_stride;
};

// The new row of a block's head and sequence goes where its exact rows end. There is one such block, whose query rows are
// all of the head's (launch.py). A whole block meets here.
TQ_FN void tq_append(TqPlace place, TqDecodeInputs inputs, TqWork work, TqExactRows exact, TqNewRows given,
                     int num_threads) {
  const int last = tq_num_exact(work) - 1;
  TQ_DEVICE Exact* key = TQ_WRITABLE(Exact, tq_exact_row(exact.sink_k, exact.window_k, work, last));
  TQ_DEVICE Exact* value = TQ_WRITABLE(Exact, tq_exact_row(exact.sink_v, exact.window_v, work, last));
  const TQ_DEVICE Exact* new_key = given.k + (work.sequence * given.k_sequence_stride + work.head * given.k_head_stride);
  const TQ_DEVICE Exact* new_value = given.v + (work.sequence * given.v_sequence_stride + work.head * given.v_head_stride);
  const TQ_DEVICE float* factors = tq_key_factors(inputs.k_constants, work.head);
  for (int d = int(place.tid); d < D; d += num_threads) {
    const Exact x = new_key[d * given.k_dim_stride];
    key[d] = BALANCED ? Exact(float(x) * factors[d]) : x;
  }
  for (int d = int(place.tid); d < DV; d += num_threads) value[d] = new_value[d * given.v_dim_stride];
  TQ_DEVICE_BARRIER();
}
