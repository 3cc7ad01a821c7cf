// A barrier for each tile of a warp's ring, opened before anything is waited for.
#if TQ_BULK
__shared__ ulong barriers[WARPS * STAGES];
ulong* barrier = barriers + int(warp) * STAGES;
if (lane == 0) {
#pragma unroll
  for (int i = 0; i < STAGES; i++) tq_barrier_open(barrier + i);
  tq_barriers_opened();
}
__syncwarp();
#endif
