// CUDA's vocabulary on a CPU: the threads of a block are fibres of one OS thread and meet at barriers, shuffles and
// tensor-core products. Owns everything that src/*.h of the kernels takes from CUDA; runtime.cpp owns fibres and copies,
// emulator.py text and memory. Asynchronous copies happen only when they are waited for, and shared memory begins as
// NaN, so what is read too early is wrong. Lanes that do not meet end the launch with a message.
// Every kernel is compiled with this text, so it includes no part of C++'s library: that took longer than all the rest.
#pragma once
#include <stdint.h>
#include <string.h>

// Beside them what kernels take from <math.h>, which C++ replaces with a large one of its own.
extern "C" float exp2f(float), fmaxf(float, float), sqrtf(float);

struct dim3 {
  unsigned x, y, z;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
using __half = _Float16;
struct __half2 {
  __half x, y;
};
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    bits = uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
  }
  operator float() const {
    const uint32_t word = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
  }
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct Strides {
  int64_t at[8];
  int64_t operator[](int i) const { return at[i]; }
};

// What a kernel's text sees of a thread; runtime.cpp keeps its stack and copies.
struct Fibre {
  dim3 thread;
  bool done, waiting;
  int site;
  unsigned char given[64], taken[64];
};
extern Fibre* fibres;
extern Fibre* self;
extern dim3 blockIdx, gridDim, blockDim;
extern const char* failure;
alignas(128) extern unsigned char cuda_arena[232448];
#define threadIdx (self->thread)
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) alignas(n)
#define __grid_constant__

// All of `count` fibres from `first` on meet at one place of the text; the last one runs `act` for all.
void meet(int first, int count, int site, void (*act)(const void*), const void* given);
template <typename In, typename Out>
Out together(int site, const In& given, void (*act)(const In*, Out*)) {
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64);
  memcpy(self->given, &given, sizeof(In));
  struct Meeting {
    int first;
    void (*act)(const In*, Out*);
  };
  const Meeting meeting{int(self->thread.x) / 32 * 32, act};
  auto exchange = [](const void* of) {
    const Meeting& all = *static_cast<const Meeting*>(of);
    In in[32];
    Out out[32];
    for (int i = 0; i < 32; i++) memcpy(&in[i], fibres[all.first + i].given, sizeof(In));
    all.act(in, out);
    for (int i = 0; i < 32; i++) memcpy(fibres[all.first + i].taken, &out[i], sizeof(Out));
  };
  meet(meeting.first, 32, site, exchange, &meeting);
  Out out;
  memcpy(&out, self->taken, sizeof(Out));
  return out;
}
#define __syncthreads() meet(0, int(blockDim.x), __LINE__, nullptr, nullptr)
#define __syncwarp() meet(int(threadIdx.x) / 32 * 32, 32, __LINE__, nullptr, nullptr)

inline unsigned lane_of(const Fibre* fibre) { return fibre->thread.x & 31; }
template <typename T>
struct Shuffle {
  T x;
  unsigned lane;
};
template <typename T>
T shuffled(T x, unsigned lane) {
  return together<Shuffle<T>, T>(-1, {x, lane}, [](const Shuffle<T>* in, T* out) {
    for (int i = 0; i < 32; i++) out[i] = in[in[i].lane & 31].x;
  });
}
#define __shfl_sync(mask, value, from) shuffled(value, from)
#define __shfl_xor_sync(mask, value, with) shuffled(value, lane_of(self) ^ (with))
inline bool any_lane(bool x) {
  return together<bool, bool>(-2, x, [](const bool* in, bool* out) {
    bool any = false;
    for (int i = 0; i < 32; i++) any = any || in[i];
    for (int i = 0; i < 32; i++) out[i] = any;
  });
}
#define __any_sync(mask, value) any_lane(value)

inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
inline float __half2float(__half x) { return float(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline float2 __half22float2(__half2 x) { return {float(x.x), float(x.y)}; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <typename To, typename From>
To bits_as(From x) {
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((uint64_t(high) << 32) | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned select) {
  const uint64_t bytes = (uint64_t(y) << 32) | x;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) out |= unsigned((bytes >> (8 * ((select >> (4 * i)) & 7))) & 255) << (8 * i);
  return out;
}

// instructions_cuda.h
inline float tq_exp2(float x) { return exp2f(x); }
inline unsigned tq_select(unsigned mask, unsigned x, unsigned y) { return (x & mask) | (y & ~mask); }
struct Operands {
  float c[4];
  unsigned a[4], b[2];
};
struct Sums {
  float c[4];
};
template <typename T>
void product(const Operands* in, Sums* out) {
  auto half_of = [](unsigned word, int i) { return float(bits_as<T>(uint16_t(word >> (16 * i)))); };
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const int r = lane / 4, c = lane % 4;
    for (int i = 0; i < 8; i++) a[r + (i & 2 ? 8 : 0)][2 * c + (i & 1) + (i & 4 ? 8 : 0)] = half_of(in[lane].a[i / 2], i & 1);
    for (int i = 0; i < 4; i++) b[2 * c + (i & 1) + (i & 2 ? 8 : 0)][r] = half_of(in[lane].b[i / 2], i & 1);
  }
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + (i & 2 ? 8 : 0), column = 2 * (lane % 4) + (i & 1);
      double sum = in[lane].c[i];
      for (int k = 0; k < 16; k++) sum += double(a[row][k]) * b[k][column];
      out[lane].c[i] = float(sum);
    }
  }
}
template <typename T>
void multiply(int site, float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const Operands given{{c[0], c[1], c[2], c[3]}, {a0, a1, a2, a3}, {b0, b1}};
  const Sums sums = together<Operands, Sums>(site, given, product<T>);
  memcpy(c, sums.c, sizeof(sums.c));
}
inline void tq_mma(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  multiply<__half>(-3, c, a0, a1, a2, a3, b0, b1);
}
inline void tq_mma_bfloat(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  multiply<__nv_bfloat16>(-4, c, a0, a1, a2, a3, b0, b1);
}
inline unsigned tq_transpose(unsigned x) {
  return together<unsigned, unsigned>(-5, x, [](const unsigned* in, unsigned* out) {
    for (int lane = 0; lane < 32; lane++) {
      out[lane] = 0;
      for (int i = 0; i < 2; i++) {
        const int row = 2 * (lane % 4) + i, column = lane / 4;
        out[lane] |= ((in[row * 4 + column / 2] >> (16 * (column % 2))) & 0xffff) << (16 * i);
      }
    }
  });
}
struct Matrices {
  unsigned of[4];
};
template <bool TRANSPOSED>
void matrices(const uintptr_t* rows, Matrices* out) {
  for (int lane = 0; lane < 32; lane++) {
    for (int k = 0; k < 4; k++) {
      uint16_t pair[2];
      for (int i = 0; i < 2; i++) {
        const int row = lane / 4, column = 2 * (lane % 4) + i;
        const uintptr_t from = rows[8 * k + (TRANSPOSED ? column : row)];
        if (from % 16) failure = "a row of a matrix is not aligned";
        memcpy(&pair[i], reinterpret_cast<const uint16_t*>(from) + (TRANSPOSED ? row : column), 2);
      }
      out[lane].of[k] = pair[0] | unsigned(pair[1]) << 16;
    }
  }
}
inline void tq_load_matrices(unsigned* out, const void* row) {
  const Matrices loaded = together<uintptr_t, Matrices>(-6, uintptr_t(row), matrices<false>);
  memcpy(out, loaded.of, sizeof(loaded.of));
}
inline void tq_load_matrices_transposed(unsigned* out, const void* row) {
  const Matrices loaded = together<uintptr_t, Matrices>(-7, uintptr_t(row), matrices<true>);
  memcpy(out, loaded.of, sizeof(loaded.of));
}
void copy_later(void* to, const void* from, int bytes);
void copies_wait(int num_pending);
template <int BYTES>
void tq_copy(void* to, const void* from) {
  copy_later(to, from, BYTES);
}
void tq_copies_end();
template <int PENDING>
void tq_copies_wait() {
  copies_wait(PENDING);
}

inline unsigned tq_count(unsigned* counter) { return (*counter)++; }

void tq_barrier_open(uint64_t* barrier);
inline void tq_barriers_opened() {}
void tq_barrier_expect(uint64_t* barrier, unsigned bytes);
void tq_bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* barrier);
void tq_barrier_wait(uint64_t* barrier, int phase);

// instructions_hopper.h: a warpgroup meets where it asks for products, and they are computed when they are waited for, of
// what shared memory then holds. Addresses are counted from a place where no tile may begin, as on a device.
constexpr unsigned ARENA_AT = 640;
inline unsigned tq_shared_address(const void* at) {
  return unsigned(static_cast<const unsigned char*>(at) - cuda_arena) + ARENA_AT;
}
inline uint64_t tq_tile_by_rows(unsigned address) { return address >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62; }
inline uint64_t tq_tile_by_dims(unsigned address, unsigned block_bytes) {
  return address >> 4 | uint64_t(block_bytes >> 4) << 16 | 64ull << 32 | 1ull << 62;
}
inline void meet_group(int site) { meet(int(threadIdx.x) / 128 * 128, 128, site, nullptr, nullptr); }

// A lane's part of a product: rows r and r + 8 of A, its columns of the sums. A is rows where it lies in shared memory.
struct Product {
  float (*sums)[4];
  int tiles;  // of eight columns of the sums
  bool adds, reads_rows, is_bfloat;
  uint64_t a, b;
  float rows[2][16];
};
void product_later(const Product& product);
void tq_products_begin();
void tq_products_end();
void products_wait(int num_pending);
template <int PENDING, int NUM>
void tq_products_wait(float (&)[NUM][4]) {
  products_wait(PENDING);
}
template <typename T>
constexpr bool IS_BFLOAT = false;
template <>
constexpr bool IS_BFLOAT<__nv_bfloat16> = true;
template <typename T>
void tq_score_product(float (&sums)[16][4], uint64_t a, uint64_t b, int adds) {
  meet_group(-8);
  product_later({sums, 16, adds != 0, true, IS_BFLOAT<T>, a, b, {}});
}
struct Words {
  unsigned of[4];
};
struct Rows {
  unsigned of[2][8];
};
inline void gather(const Words* in, Rows* out) {
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < 8; i++) {  // pairs of elements
      for (int h = 0; h < 2; h++) out[lane].of[h][i] = in[lane / 4 * 4 + i % 4].of[i / 4 * 2 + h];
    }
  }
}
template <typename T, int NUM>
void tq_value_product(float (&sums)[NUM][4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, uint64_t b) {
  meet_group(-9);
  const Rows rows = together<Words, Rows>(-10, {{a0, a1, a2, a3}}, gather);
  Product product{sums, NUM, true, false, IS_BFLOAT<T>, 0, b, {}};
  for (int h = 0; h < 2; h++) {
    for (int i = 0; i < 16; i++) product.rows[h][i] = float(bits_as<T>(uint16_t(rows.of[h][i / 2] >> (16 * (i & 1)))));
  }
  product_later(product);
}
inline void tq_shared_written() {}
void tq_barrier_open_for(uint64_t* barrier, int count);
void tq_barrier_arrive(uint64_t* barrier);
template <int NUM>
void tq_meet(int number) {
  meet(int(threadIdx.x) / NUM * NUM, NUM, -100 - number, nullptr, nullptr);
}
template <int NUM>
void tq_registers_down() {
  meet_group(-11);
}
template <int NUM>
void tq_registers_up() {
  meet_group(-12);
}

// Runs one block after the other; returns what went wrong, or null.
const char* run_blocks(dim3 grid, unsigned num_threads, void (*body)(const void*), const void* kernel);
template <typename Kernel>
const char* run_grid(dim3 grid, unsigned num_threads, const Kernel& kernel) {
  return run_blocks(grid, num_threads, [](const void* of) { (*static_cast<const Kernel*>(of))(); }, &kernel);
}
