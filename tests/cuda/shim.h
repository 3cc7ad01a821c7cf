// CUDA's vocabulary on a CPU: the threads of a block are fibres of one OS thread and meet at barriers, shuffles and
// tensor-core products. Owns everything that src/*.h of the kernels takes from CUDA; emulator.py owns text and memory.
// Asynchronous copies happen only when they are waited for, and shared memory begins as NaN, so what is read too early
// is wrong. Lanes that do not meet end the launch with a message.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

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

struct Copy {
  void* to;
  const void* from;
  int bytes;
};
struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack;  // not filled: pages that a thread never reaches take no memory
  dim3 thread;
  bool done = false, waiting = false;
  int site = 0;
  unsigned char given[40], taken[40];
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};
constexpr size_t STACK_BYTES = 256 << 10;
inline std::vector<Fibre> fibres;
inline Fibre* self;
inline ucontext_t scheduler;
inline dim3 blockIdx, gridDim, blockDim;
inline uint64_t progress;
inline const char* failure;
alignas(128) inline unsigned char cuda_arena[232448];
#define threadIdx (self->thread)
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) alignas(n)
#define __grid_constant__

inline void pause_fibre() { swapcontext(&self->context, &scheduler); }

// All of `count` fibres from `first` on meet at one place of the text; the last one runs `act` for all.
inline void meet(int first, int count, int site, const std::function<void()>& act) {
  self->waiting = true;
  self->site = site;
  bool all = true;
  for (int i = first; i < first + count; i++) {
    all = all && fibres[i].waiting && fibres[i].site == site;
  }
  progress++;
  if (all) {
    act();
    for (int i = first; i < first + count; i++) fibres[i].waiting = false;
    return;
  }
  while (self->waiting && !failure) pause_fibre();
  if (failure) pause_fibre();
}
template <typename In, typename Out>
Out together(int site, const In& given, void (*act)(const In*, Out*)) {
  static_assert(sizeof(In) <= 40 && sizeof(Out) <= 40);
  memcpy(self->given, &given, sizeof(In));
  const int first = int(self->thread.x) / 32 * 32;
  meet(first, 32, site, [&] {
    In in[32];
    Out out[32];
    for (int i = 0; i < 32; i++) memcpy(&in[i], fibres[first + i].given, sizeof(In));
    act(in, out);
    for (int i = 0; i < 32; i++) memcpy(fibres[first + i].taken, &out[i], sizeof(Out));
  });
  Out out;
  memcpy(&out, self->taken, sizeof(Out));
  return out;
}
#define __syncthreads() meet(0, int(blockDim.x), __LINE__, [] {})
#define __syncwarp() meet(int(threadIdx.x) / 32 * 32, 32, __LINE__, [] {})

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
    const bool any = std::any_of(in, in + 32, [](bool b) { return b; });
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
template <int BYTES>
void tq_copy(void* to, const void* from) {
  if ((uintptr_t(to) | uintptr_t(from)) % BYTES) failure = "an asynchronous copy is not aligned";
  self->open.push_back({to, from, BYTES});
}
inline void tq_copies_end() {
  self->groups.push_back(self->open);
  self->open.clear();
}
template <int PENDING>
void tq_copies_wait() {
  while (self->groups.size() > PENDING) {
    for (const Copy& copy : self->groups.front()) memcpy(copy.to, copy.from, copy.bytes);
    self->groups.erase(self->groups.begin());
  }
}

inline unsigned tq_count(unsigned* counter) { return (*counter)++; }

// Barriers of bulk copies: a word that counts completed phases; what was announced and what is under way beside it.
struct Announced {
  int expected = 0;
  std::vector<Copy> copies;
};
inline std::map<uint64_t*, Announced> announced;
inline void tq_barrier_open(uint64_t* barrier) {
  *barrier = 0;
  announced[barrier] = {};
}
inline void tq_barriers_opened() {}
inline void tq_barrier_expect(uint64_t* barrier, unsigned bytes) {
  if (!announced.count(barrier)) failure = "a barrier is used before it is opened";
  if (announced[barrier].expected) failure = "a barrier's phase is announced twice";
  announced[barrier].expected = int(bytes);
}
inline void tq_bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  if ((uintptr_t(to) | uintptr_t(from) | bytes) % 16) failure = "a bulk copy is not aligned";
  announced[barrier].copies.push_back({to, from, int(bytes)});
}
// Copies happen when a thread waits for their phase: earlier readers find what was there before.
inline void tq_barrier_wait(uint64_t* barrier, int phase) {
  for (int turns = 0; int(*barrier & 1) == phase; turns++) {
    Announced& mine = announced[barrier];
    int bytes = 0;
    for (const Copy& copy : mine.copies) bytes += copy.bytes;
    if (bytes && bytes == mine.expected) {
      for (const Copy& copy : mine.copies) memcpy(copy.to, copy.from, copy.bytes);
      mine = {};
      ++*barrier;
    } else {
      if (turns > 1000) failure = "a barrier waits for other bytes than are copied";
      pause_fibre();
    }
  }
}

// Runs one block after the other; returns what went wrong, or null.
inline const char* run_grid(dim3 grid, unsigned num_threads, const std::function<void()>& kernel) {
  static std::function<void()> body;
  body = kernel;
  failure = nullptr;
  gridDim = grid;
  blockDim = {num_threads, 1, 1};
  fibres = std::vector<Fibre>(num_threads);
  struct Stacks {  // libraries stay loaded: what one keeps is kept for as long as the tests run
    ~Stacks() { fibres = std::vector<Fibre>(); }
  } stacks;
  for (auto& fibre : fibres) fibre.stack.reset(new char[STACK_BYTES]);
  for (unsigned block = 0; block < grid.x * grid.y * grid.z; block++) {
    blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
    memset(cuda_arena, 0xff, sizeof(cuda_arena));
    announced.clear();
    for (unsigned i = 0; i < num_threads; i++) {
      Fibre& fibre = fibres[i];
      fibre.thread = {i, 0, 0};
      fibre.done = fibre.waiting = false;
      fibre.groups.clear();
      fibre.open.clear();
      getcontext(&fibre.context);
      fibre.context.uc_stack = {fibre.stack.get(), 0, STACK_BYTES};
      fibre.context.uc_link = &scheduler;
      makecontext(&fibre.context, [] { body(); self->done = true; progress++; }, 0);
    }
    for (bool busy = true; busy && !failure;) {
      const uint64_t before = progress;
      busy = false;
      for (auto& fibre : fibres) {
        if (fibre.done) continue;
        busy = true;
        self = &fibre;
        swapcontext(&scheduler, &fibre.context);
      }
      bool moved = progress != before;
      for (auto& fibre : fibres) moved = moved || (!fibre.done && !fibre.waiting);
      if (busy && !moved && !failure) failure = "threads wait for others that never come";
    }
    if (failure) return failure;
  }
  return nullptr;
}
