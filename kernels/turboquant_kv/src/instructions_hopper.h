// What only Hopper has (compute capability 9.0, compiled as sm_90a): products of a warpgroup, which four warps ask for
// together and wait for later, and what its kernels need beside them. tests/cuda has its own version of these.
//
// A warpgroup's product adds A (64 x 16) B (16 x N) to sums (64 x N). Each of its warps has 16 rows of sums and of A, and
// lanes hold of these what fragments_cuda.h says. A and B in shared memory are tiles as history.h writes them: blocks of 64
// dims, in each of which a row (a key, or a query) is 128 bytes, its piece of 16 bytes at its number XOR the row's low
// three bits. tq_tile_by_rows reads 16 dims of many rows, tq_tile_by_dims 16 rows of many dims.
#pragma once

TQ_FN uint tq_shared_address(const void* at) { return uint(__cvta_generic_to_shared(at)); }

// What such a product is told of an operand in shared memory: where it begins (bits 0 .. 13), how far the next 64 dims
// are (16 .. 29), how far the next eight rows (32 .. 45), all in units of 16 bytes, and that pieces are swapped (62).
TQ_FN ulong tq_tile_by_rows(uint address) { return ulong(address >> 4) | 1ul << 16 | 64ul << 32 | 1ul << 62; }
TQ_FN ulong tq_tile_by_dims(uint address, uint block_bytes) {
  return ulong(address >> 4) | ulong(block_bytes >> 4) << 16 | 64ul << 32 | 1ul << 62;
}

// Before products read registers that something else has written, sums among them.
TQ_FN void tq_products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
TQ_FN void tq_products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until no more than PENDING groups of products are under way; sums are those of the last that is then done.
template <int PENDING, int NUM>
TQ_FN void tq_products_wait(float (&sums)[NUM][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
  for (int j = 0; j < NUM; j++) {  // the compiler does not know that they have changed
    asm volatile("" : "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3])::"memory");
  }
}

// sums = or += A B^T, A and B by rows: scores of queries by keys.
template <typename T> TQ_FN void tq_score_product(float (&sums)[16][4], ulong a, ulong b, int adds);
// sums += A B, A in registers, B by dims: values with weights.
template <typename T> TQ_FN void tq_value_product(float (&sums)[16][4], uint a0, uint a1, uint a2, uint a3, ulong b);
template <typename T> TQ_FN void tq_value_product(float (&sums)[8][4], uint a0, uint a1, uint a2, uint a3, ulong b);
#define TQ_SUM(j) "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3])
#define TQ_SUMS_8 TQ_SUM(0), TQ_SUM(1), TQ_SUM(2), TQ_SUM(3), TQ_SUM(4), TQ_SUM(5), TQ_SUM(6), TQ_SUM(7)
#define TQ_SUMS_16 \
  TQ_SUMS_8, TQ_SUM(8), TQ_SUM(9), TQ_SUM(10), TQ_SUM(11), TQ_SUM(12), TQ_SUM(13), TQ_SUM(14), TQ_SUM(15)
#define TQ_NUMBERS_8 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15" \
  ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define TQ_NUMBERS_16 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15" \
  ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31" \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
  ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define TQ_PRODUCTS(type, name) \
  template <> TQ_FN void tq_score_product<type>(float (&sums)[16][4], ulong a, ulong b, int adds) { \
    asm volatile( \
        "{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " " \
        TQ_NUMBERS_16 ", %64, %65, p, 1, 1, 0, 0; }" \
        : TQ_SUMS_16 : "l"(a), "l"(b), "r"(adds)); \
  } \
  template <> TQ_FN void tq_value_product<type>(float (&sums)[16][4], uint a0, uint a1, uint a2, uint a3, ulong b) { \
    asm volatile( \
        "{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " " \
        TQ_NUMBERS_16 ", {%64,%65,%66,%67}, %68, p, 1, 1, 1; }" \
        : TQ_SUMS_16 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b)); \
  } \
  template <> TQ_FN void tq_value_product<type>(float (&sums)[8][4], uint a0, uint a1, uint a2, uint a3, ulong b) { \
    asm volatile( \
        "{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " " \
        TQ_NUMBERS_8 ", {%32,%33,%34,%35}, %36, p, 1, 1, 1; }" \
        : TQ_SUMS_8 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b)); \
  }
TQ_PRODUCTS(__half, "f16")
TQ_PRODUCTS(__nv_bfloat16, "bf16")

// Shared memory that threads have written is then seen by products and bulk copies.
TQ_FN void tq_shared_written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier that `count` arrivals complete; tq_barrier_expect is one.
TQ_FN void tq_barrier_open_for(ulong* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(tq_shared_address(barrier)), "r"(count) : "memory");
}
TQ_FN void tq_barrier_arrive(ulong* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(tq_shared_address(barrier)) : "memory");
}

// A numbered barrier of a block, 1 .. 15, to which NUM threads come.
template <int NUM>
TQ_FN void tq_meet(int number) { asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(NUM) : "memory"); }

// A whole warpgroup gives registers back, or asks for more, until each thread has NUM.
template <int NUM>
TQ_FN void tq_registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(NUM)); }
template <int NUM>
TQ_FN void tq_registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(NUM)); }
