// Keys balanced against queries (cache/key_balance.py), where the decode kernel does it: BALANCED. Behind the keys' means its
// constants then have what keys are multiplied by, (HEADS, D), and what queries are. Products are rounded to the keys' and
// the queries' type, as those of MLX are, which makes them in every other kind of step: both give the same rows.
#pragma once
#include "work.h"

TQ_FN const TQ_DEVICE float* tq_key_factors(const TQ_DEVICE float* k_constants, int head) {
  return k_constants + (K_ROTATION + (HEADS + head) * D);
}
TQ_FN const TQ_DEVICE float* tq_query_factors(const TQ_DEVICE float* k_constants, int head) {
  return k_constants + (K_ROTATION + (2 * HEADS + head) * D);
}

// Dim d of a query vector (tq_query_row).
TQ_FN In tq_query_dim(TqDecodeInputs inputs, TqWork work, const TQ_DEVICE In* query, int d) {
  const In x = query[d * inputs.dim_stride];
  return BALANCED ? In(float(x) * tq_query_factors(inputs.k_constants, work.head)[d]) : x;
}
