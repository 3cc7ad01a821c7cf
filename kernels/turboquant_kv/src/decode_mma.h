// Decode attention on tensor cores, CUDA's variant of decode_portable.h: the same plan, the same parts, the same merge.
#pragma once
#include "mma_codes.h"
#include "mma_exact.h"
#include "mma_merge.h"

// A block's part.
TQ_FN void tq_mma_part(TqPlace place, TqDecodeInputs inputs, TqWork work, TqExactRows exact, TqNewRows given, uchar* arena,
                       TqMmaShared& shared, float* parts) {
  TqMmaRows rows;
  tq_start(rows);
  int num_busy;
  if (place.block_x == 0) {
    if (APPENDS) tq_append(place, inputs, work, exact, given, THREADS);
    num_busy = tq_num_busy_exact(work);
    if (EXACT_MMA) tq_attend_exact(place, inputs, work, exact, arena, rows);
    else tq_attend_exact_plainly(place, inputs, work, exact, arena, rows);
  } else {
    num_busy = tq_attend_codes(place, inputs, work, arena, shared, rows);
  }
  tq_write_part(place, work, rows, num_busy, arena, shared, parts);
}

// Parts alone; combine.h merges them in a second launch.
TQ_FN void tq_decode_mma(TqPlace place, TqDecodeInputs inputs, TqExactRows exact, TqNewRows given, float* parts) {
  __shared__ TqMmaShared shared;
  if (BULK) tq_open_barriers(shared.barriers + int(place.warp) * STAGES, place.lane);
  const TqWork work = tq_work(place, inputs.plan);
  if (!tq_has_work(place, work)) return;
  tq_mma_part(place, inputs, work, exact, given, tq_arena(), shared, parts);
}

// Parts, and their merge by each row group's last block.
template <typename Sinks>
TQ_FN void tq_decode_mma_fused(TqPlace place, TqDecodeInputs inputs, TqExactRows exact, TqNewRows given, TqFinish finish,
                               Sinks sinks, float* parts) {
  __shared__ TqMmaShared shared;
  if (BULK) tq_open_barriers(shared.barriers + int(place.warp) * STAGES, place.lane);
  const TqWork work = tq_work(place, inputs.plan);
  if (!tq_has_work(place, work)) return;
  uchar* arena = tq_arena();
  tq_mma_part(place, inputs, work, exact, given, arena, shared, parts);
  tq_finish(place, work, finish, sinks, parts, arena, shared);
}
