// What CUDA has no function for: tests/cuda runs every other line on a CPU and has its own version of these.
#pragma once
TQ_FN float tq_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Bits of x where mask has ones, of y elsewhere. The compiler takes two instructions where the mask is a constant.
TQ_FN uint tq_select(uint mask, uint x, uint y) {
  uint z;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(z) : "r"(x), "r"(y), "r"(mask));
  return z;
}

// The m16n8k16 products of tensor cores and a transposed 8x8 tile of 16-bit values.
TQ_FN void tq_mma(float* c, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
TQ_FN void tq_mma_bfloat(float* c, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
TQ_FN uint tq_transpose(uint x) {
  uint y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(y) : "r"(x));
  return y;
}

// Asynchronous copies to shared memory; each ends a group, and groups complete in order.
template <int BYTES>
TQ_FN void tq_copy(void* to, const void* from) {
  const uint address = uint(__cvta_generic_to_shared(to));
  if (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address), "l"(from) : "memory");
}
TQ_FN void tq_copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
TQ_FN void tq_copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Hopper's copy engine: bytes to shared memory, counted by a barrier there that one arrival and all expected bytes
// complete. Addresses and sizes are multiples of 16.
TQ_FN void tq_barrier_open(ulong* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(uint(__cvta_generic_to_shared(barrier))) : "memory");
}
TQ_FN void tq_barriers_opened() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
TQ_FN void tq_barrier_expect(ulong* barrier, uint num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(uint(__cvta_generic_to_shared(barrier))), "r"(num_bytes) : "memory");
}
TQ_FN void tq_bulk_copy(void* to, const void* from, uint num_bytes, ulong* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(uint(__cvta_generic_to_shared(to))), "l"(from), "r"(num_bytes),
               "r"(uint(__cvta_generic_to_shared(barrier))) : "memory");
}
TQ_FN void tq_barrier_wait(ulong* barrier, int phase) {
  uint done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(uint(__cvta_generic_to_shared(barrier))), "r"(phase) : "memory");
  } while (!done);
}

// Four 8x8 matrices of 16-bit values from shared memory: lane i names row i % 8 of matrix i / 8, 16 aligned bytes, and
// gets of matrix k, in out[k], row lane / 4 and columns 2 * (lane % 4) and the next; transposed, rows and columns swap.
TQ_FN void tq_load_matrices(uint* out, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(uint(__cvta_generic_to_shared(row))));
}
TQ_FN void tq_load_matrices_transposed(uint* out, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(uint(__cvta_generic_to_shared(row))));
}

// Adds one; returns what was there. Orders this thread's view of memory before and after, for the whole device.
TQ_FN uint tq_count(uint* counter) {
  uint before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
