// What shim.h declares and every kernel shares: fibres, their meetings, and copies under way. Compiled once.
#include "shim.h"

#include <ucontext.h>

#include <map>
#include <memory>
#include <vector>

namespace {

struct Copy {
  void* to;
  const void* from;
  int bytes;
};
// The part of a fibre that a kernel's text does not see.
struct Context {
  ucontext_t registers;
  std::unique_ptr<char[]> stack;  // not filled: pages that a thread never reaches take no memory
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};
// Barriers of bulk copies: a word that counts completed phases; what was announced and what is under way beside it.
struct Announced {
  int expected = 0;
  std::vector<Copy> copies;
};

constexpr size_t STACK_BYTES = 256 << 10;
std::vector<Context> contexts;
ucontext_t scheduler;
uint64_t progress;
std::map<uint64_t*, Announced> announced;
void (*run_thread)(const void*);
const void* run_what;

Context& context() { return contexts[self - fibres]; }
void pause_fibre() { swapcontext(&context().registers, &scheduler); }
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
  for (int i = first; i < first + count; i++) {
    all = all && fibres[i].waiting && fibres[i].site == site;
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

void tq_barrier_open(uint64_t* barrier) {
  *barrier = 0;
  announced[barrier] = {};
}
void tq_barrier_expect(uint64_t* barrier, unsigned bytes) {
  if (!announced.count(barrier)) failure = "a barrier is used before it is opened";
  if (announced[barrier].expected) failure = "a barrier's phase is announced twice";
  announced[barrier].expected = int(bytes);
}
void tq_bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  if ((uintptr_t(to) | uintptr_t(from) | bytes) % 16) failure = "a bulk copy is not aligned";
  announced[barrier].copies.push_back({to, from, int(bytes)});
}
// Copies happen when a thread waits for their phase: earlier readers find what was there before.
void tq_barrier_wait(uint64_t* barrier, int phase) {
  for (int turns = 0; int(*barrier & 1) == phase; turns++) {
    Announced& mine = announced[barrier];
    int bytes = 0;
    for (const Copy& copy : mine.copies) bytes += copy.bytes;
    if (bytes && bytes == mine.expected) {
      copy_all(mine.copies);
      mine = {};
      ++*barrier;
    } else {
      if (turns > 1000) failure = "a barrier waits for other bytes than are copied";
      pause_fibre();
    }
  }
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
  for (auto& one : contexts) one.stack.reset(new char[STACK_BYTES]);
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
      getcontext(&one.registers);
      one.registers.uc_stack = {one.stack.get(), 0, STACK_BYTES};
      one.registers.uc_link = &scheduler;
      makecontext(&one.registers, [] { run_thread(run_what); self->done = true; progress++; }, 0);
    }
    for (bool busy = true; busy && !failure;) {
      const uint64_t before = progress;
      busy = false;
      for (unsigned i = 0; i < num_threads; i++) {
        if (threads[i].done) continue;
        busy = true;
        self = &threads[i];
        swapcontext(&scheduler, &contexts[i].registers);
      }
      bool moved = progress != before;
      for (auto& fibre : threads) moved = moved || (!fibre.done && !fibre.waiting);
      if (busy && !moved && !failure) failure = "threads wait for others that never come";
    }
    if (failure) return failure;
  }
  return nullptr;
}
