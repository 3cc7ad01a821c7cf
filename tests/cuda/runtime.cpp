// What shim.h declares and every kernel shares: fibres, their meetings, and copies under way. Compiled once.
#include "shim.h"

#include <map>
#include <memory>
#include <vector>

#include "switch.h"

namespace {

struct Copy {
  void* to;
  const void* from;
  int bytes;
};
// The part of a fibre that a kernel's text does not see.
struct Context {
  void* stack_top;  // while it does not run
  std::unique_ptr<char[]> stack;  // not filled: pages that a thread never reaches take no memory
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
  std::vector<std::vector<Product>> product_groups;
  std::vector<Product> products;
  bool may_ask;  // for products: none waited for since
};
// A barrier is a word that counts completed phases; beside it are how many arrivals complete one, how many there were,
// and the bytes that were announced and are under way.
struct Announced {
  int count = 0, arrived = 0, expected = 0;
  std::vector<Copy> copies;
};

constexpr size_t STACK_BYTES = 256 << 10;
std::vector<Context> contexts;
void* scheduler;
uint64_t progress;
std::map<uint64_t*, Announced> announced;
void (*run_thread)(const void*);
const void* run_what;

Context& context() { return contexts[self - fibres]; }
void pause_fibre() { emu_switch(&context().stack_top, scheduler); }
void run_fibre() {
  for (;;) {  // a block after the other
    run_thread(run_what);
    self->done = true;
    progress++;
    pause_fibre();
  }
}
void copy_all(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) memcpy(copy.to, copy.from, copy.bytes);
}

}  // namespace

Fibre* fibres;
Fibre* self;
dim3 blockIdx, gridDim, blockDim;
const char* failure;
alignas(128) unsigned char cuda_arena[232448];

void meet(int first, int count, int site, void (*act)(const void*), const void* given) {
  self->waiting = true;
  self->site = site;
  bool all = true;
  for (int i = first + count - 1; i >= first && all; i--) {  // the last one mostly is the last to come
    all = fibres[i].waiting && fibres[i].site == site;
  }
  progress++;
  if (all) {
    if (act) act(given);
    for (int i = first; i < first + count; i++) fibres[i].waiting = false;
    return;
  }
  while (self->waiting && !failure) pause_fibre();
  if (failure) pause_fibre();
}

void copy_later(void* to, const void* from, int bytes) {
  if ((uintptr_t(to) | uintptr_t(from)) % bytes) failure = "an asynchronous copy is not aligned";
  context().open.push_back({to, from, bytes});
}
void tq_copies_end() {
  context().groups.push_back(context().open);
  context().open.clear();
}
void copies_wait(int num_pending) {
  auto& groups = context().groups;
  while (int(groups.size()) > num_pending) {
    copy_all(groups.front());
    groups.erase(groups.begin());
  }
}

void tq_barrier_open(uint64_t* barrier) { tq_barrier_open_for(barrier, 1); }
void tq_barrier_open_for(uint64_t* barrier, int count) {
  *barrier = 0;
  announced[barrier] = {count};
}
void tq_barrier_arrive(uint64_t* barrier) {
  if (!announced.count(barrier)) failure = "a barrier is used before it is opened";
  Announced& mine = announced[barrier];
  if (mine.arrived == mine.count) failure = "more arrive at a barrier than complete its phase";
  mine.arrived++;
  if (mine.arrived == mine.count && !mine.expected) {
    mine.arrived = 0;
    ++*barrier;
  }
}
void tq_barrier_expect(uint64_t* barrier, unsigned bytes) {
  if (!announced.count(barrier)) failure = "a barrier is used before it is opened";
  if (announced[barrier].expected) failure = "a barrier's phase is announced twice";
  announced[barrier].expected = int(bytes);
  tq_barrier_arrive(barrier);
}
void tq_bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  if ((uintptr_t(to) | uintptr_t(from) | bytes) % 16) failure = "a bulk copy is not aligned";
  announced[barrier].copies.push_back({to, from, int(bytes)});
  memset(to, 0xff, bytes);
}
// Copies happen when a thread waits for their phase; from when they are asked for until then readers find NaN.
void tq_barrier_wait(uint64_t* barrier, int phase) {
  for (int turns = 0; int(*barrier & 1) == phase; turns++) {
    Announced& mine = announced[barrier];
    int bytes = 0;
    for (const Copy& copy : mine.copies) bytes += copy.bytes;
    if (mine.arrived == mine.count && bytes && bytes == mine.expected) {
      copy_all(mine.copies);
      mine = {mine.count};
      ++*barrier;
    } else {
      if (turns > 100000) failure = "a barrier waits for other bytes than are copied, or for who never arrives";
      pause_fibre();
    }
  }
}

// Where an element lies that a product reads at an address: bits 4 .. 6 are swapped by bits 7 .. 9.
static float element(uint64_t address, bool is_bfloat) {
  address ^= (address >> 7 & 7) << 4;
  if (address < ARENA_AT || address + 2 > ARENA_AT + sizeof(cuda_arena)) {
    failure = "a product reads past shared memory";
    return 0;
  }
  uint16_t bits;
  memcpy(&bits, cuda_arena + address - ARENA_AT, 2);
  return is_bfloat ? float(bits_as<__nv_bfloat16>(bits)) : float(bits_as<__half>(bits));
}
static uint64_t start_of(uint64_t tile) { return (tile & 0x3fff) << 4; }
static uint64_t blocks_of(uint64_t tile) { return (tile >> 16 & 0x3fff) << 4; }
static uint64_t eights_of(uint64_t tile) { return (tile >> 32 & 0x3fff) << 4; }
static uint64_t by_rows(uint64_t tile, int row, int k) {
  return start_of(tile) + row / 8 * eights_of(tile) + row % 8 * 128 + 2 * k;
}
static uint64_t by_dims(uint64_t tile, int k, int dim) {
  return start_of(tile) + k / 8 * eights_of(tile) + k % 8 * 128 + dim / 64 * blocks_of(tile) + dim % 64 * 2;
}
static void compute(const Product& product) {
  const int lane = self->thread.x % 32, first_row = self->thread.x / 32 % 4 * 16 + lane / 4;
  if ((product.b >> 62) != 1 || (product.reads_rows && (product.a >> 62) != 1)) failure = "a tile is not swapped";
  float rows[2][16];
  for (int h = 0; h < 2; h++) {
    for (int k = 0; k < 16; k++) {
      rows[h][k] = product.reads_rows ? element(by_rows(product.a, first_row + 8 * h, k), product.is_bfloat) : product.rows[h][k];
    }
  }
  for (int j = 0; j < product.tiles; j++) {
    for (int i = 0; i < 2; i++) {
      const int column = 8 * j + 2 * (lane % 4) + i;
      double sum[2] = {0, 0};
      for (int k = 0; k < 16; k++) {
        const uint64_t at = product.reads_rows ? by_rows(product.b, column, k) : by_dims(product.b, k, column);
        const float b = element(at, product.is_bfloat);
        for (int h = 0; h < 2; h++) sum[h] += double(rows[h][k]) * b;
      }
      for (int h = 0; h < 2; h++) {
        float& to = product.sums[j][2 * h + i];
        to = float((product.adds ? to : 0.0f) + sum[h]);
      }
    }
  }
}
void tq_products_begin() { context().may_ask = true; }
void product_later(const Product& product) {
  if (!context().may_ask) failure = "products are asked for before registers are fenced";
  context().products.push_back(product);
}
void tq_products_end() {
  context().product_groups.push_back(context().products);
  context().products.clear();
}
void products_wait(int num_pending) {
  auto& groups = context().product_groups;
  if (int(groups.size()) > num_pending) pause_fibre();  // others run meanwhile: who was told too early spoils a tile
  while (int(groups.size()) > num_pending) {
    for (const Product& product : groups.front()) compute(product);
    groups.erase(groups.begin());
  }
  context().may_ask = false;
}

const char* run_blocks(dim3 grid, unsigned num_threads, void (*body)(const void*), const void* kernel) {
  run_thread = body;
  run_what = kernel;
  failure = nullptr;
  gridDim = grid;
  blockDim = {num_threads, 1, 1};
  // Freed in the end: libraries stay loaded, and what one keeps is kept for as long as the tests run.
  std::vector<Fibre> threads(num_threads);
  struct Contexts {
    ~Contexts() { contexts = std::vector<Context>(); }
  } freed;
  contexts = std::vector<Context>(num_threads);
  fibres = threads.data();
  for (auto& one : contexts) {
    one.stack.reset(new char[STACK_BYTES]);
    one.stack_top = first_frame(one.stack.get() + STACK_BYTES, run_fibre);
  }
  for (unsigned block = 0; block < grid.x * grid.y * grid.z; block++) {
    blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
    memset(cuda_arena, 0xff, sizeof(cuda_arena));
    announced.clear();
    for (unsigned i = 0; i < num_threads; i++) {
      Context& one = contexts[i];
      threads[i].thread = {i, 0, 0};
      threads[i].done = threads[i].waiting = false;
      one.groups.clear();
      one.open.clear();
      one.product_groups.clear();
      one.products.clear();
      one.may_ask = false;
    }
    for (bool busy = true; busy && !failure;) {
      const uint64_t before = progress;
      busy = false;
      for (unsigned i = 0; i < num_threads; i++) {
        if (threads[i].done) continue;
        busy = true;
        self = &threads[i];
        emu_switch(&scheduler, contexts[i].stack_top);
      }
      bool moved = progress != before;
      for (auto& fibre : threads) moved = moved || (!fibre.done && !fibre.waiting);
      if (busy && !moved && !failure) failure = "threads wait for others that never come";
    }
    if (failure) return failure;
  }
  return nullptr;
}
