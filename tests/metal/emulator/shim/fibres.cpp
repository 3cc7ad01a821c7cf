// Runs a launch: one fibre per thread of a threadgroup, simdgroup by simdgroup, threadgroup after threadgroup.
// Owns the scheduler, the meeting points (simd operations and barriers) and the report of what went wrong.
// One OS thread only, so the order is the same in every run.
#include "runtime.h"
#include "switch.h"
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>

extern "C" void emu_kernel(void** buffers, const emu_place* place); // the kernel's own library

namespace emu {

Fibre fibres[MAX_THREADS];
Fibre* running;
uint32_t num_fibres, clock_now, group_start, barrier_clock[2], simd_clock[2][LANES], group_number;
Counts counts;
Result* result;

static void *main_stack, *kernel_buffers[128];
static uint8_t* stacks;
static uint64_t stack_stride;
static bool failed, timed_out;
static pthread_t runner;
static unsigned char slots[2][LANES][LANES][64]; // parity, simdgroup, lane

static const char* const OP_NAMES[EMU_NUM_OPS] = {
    "simd_sum", "simd_product", "simd_max", "simd_min", "simd_and", "simd_or", "simd_xor", "simd_prefix sum or product",
    "simd_shuffle", "simd_shuffle_xor", "simd_shuffle_up", "simd_shuffle_down", "simd_shuffle_rotate", "simd_broadcast",
    "simd_broadcast_first", "simd_ballot", "simd_any", "simd_all", "simd_is_first", "simd_active_threads_mask",
    "simdgroup_load", "simdgroup_store", "simdgroup_multiply", "simdgroup_barrier", "quad operation",
    "threadgroup_barrier"};

static void write_failure(const char* kind, uintptr_t code, const emu_site* site, const char* text) {
    int used = 0, room = sizeof result->message;
    if (running) {
        const emu_place& p = running->place;
        used = snprintf(result->message, room, "threadgroup (%u, %u, %u), thread (%u, %u, %u), lane %u of simdgroup %u: ",
                        p.group[0], p.group[1], p.group[2], p.local[0], p.local[1], p.local[2], p.lane, p.simdgroup);
    }
    used += snprintf(result->message + used, room - used, "%s", text);
    if (site && used < room) snprintf(result->message + used, room - used, " [%s:%u]", site->file, site->line);
    snprintf(result->kind, sizeof result->kind, "%s", kind);
    extern __attribute__((visibility("hidden"))) const char image_start[] asm("__ehdr_start");
    result->code_offset = code ? code - (uintptr_t)image_start : 0;
    failed = true;
}

void fail(const char* kind, uintptr_t code, const emu_site* site, const char* format, ...) {
    char text[700];
    va_list given;
    va_start(given, format);
    vsnprintf(text, sizeof text, format, given);
    va_end(given);
    write_failure(kind, code, site, text);
    void* lost;
    running = nullptr;
    emu_switch(&lost, main_stack);
    __builtin_unreachable();
}

static void to_scheduler(Fibre* self) { emu_switch(&self->stack_pointer, main_stack); }

static void begin() {
    emu_kernel(kernel_buffers, &running->place);
    running->state = DONE;
    to_scheduler(running);
}

static void resume(Fibre& fibre) {
    running = &fibre;
    emu_switch(&main_stack, fibre.stack_pointer);
    running = nullptr;
}

static void prepare(Fibre& fibre, uint32_t index, const Launch& launch, const uint32_t* group, const uint32_t* extent) {
    uintptr_t low = (uintptr_t)stacks + index * stack_stride + 4096, high = low + launch.stack_bytes;
    void* frame = first_frame((void*)high, begin);
    emu_place place{};
    uint32_t rest = index;
    for (int axis = 0; axis < 3; ++axis) {
        place.group[axis] = group[axis], place.group_threads[axis] = extent[axis];
        place.local[axis] = rest % extent[axis], rest /= extent[axis];
        place.grid[axis] = launch.grid[axis], place.full_group_threads[axis] = launch.group[axis];
        place.groups[axis] = (launch.grid[axis] + launch.group[axis] - 1) / launch.group[axis];
    }
    place.flat = index, place.lane = index % LANES, place.simdgroup = index / LANES;
    place.num_simdgroups = (num_fibres + LANES - 1) / LANES;
    place.num_full_simdgroups = (launch.group[0] * launch.group[1] * launch.group[2] + LANES - 1) / LANES;
    fibre = Fibre{frame, low, high, READY, 0, 0, 0, nullptr, place};
}

static const char* doing(const Fibre& fibre, char* text, size_t room) {
    if (fibre.state == DONE) snprintf(text, room, "thread %u has returned", fibre.place.flat);
    else snprintf(text, room, "thread %u waits at %s [%s:%u]", fibre.place.flat, OP_NAMES[fibre.op], fibre.site->file,
                  fibre.site->line);
    return text;
}

static bool same_stop(const Fibre& a, const Fibre& b) {
    return a.state == b.state && a.op == b.op && (a.site == b.site || (a.site->line == b.site->line &&
           a.site->column == b.site->column && !strcmp(a.site->file, b.site->file)));
}

static void report_divergence(const char* kind, const Fibre& a, const Fibre& b) {
    char one[200], two[200], text[420];
    snprintf(text, sizeof text, "%s while %s", doing(a, one, sizeof one), doing(b, two, sizeof two));
    running = const_cast<Fibre*>(&a);
    write_failure(kind, 0, nullptr, text);
    running = nullptr;
}

// Lets lanes go on that all stand at one simd operation. False: none of them stands at one.
static bool release_simdgroup(uint32_t first, uint32_t end) {
    const Fibre* at = nullptr;
    for (uint32_t i = first; i < end && !at; ++i) at = fibres[i].state == AT_SIMD ? &fibres[i] : nullptr;
    if (!at) return false;
    for (uint32_t i = first; i < end; ++i)
        if (!same_stop(*at, fibres[i])) return report_divergence("simd-divergence", *at, fibres[i]), false;
    if (at->op == EMU_SIMD_BARRIER) {
        clock_now += 1;
        if (at->flags & 1) simd_clock[SPACE_DEVICE][first / LANES] = clock_now;
        if (at->flags & 2) simd_clock[SPACE_THREADGROUP][first / LANES] = clock_now;
    }
    bool matrix = at->op == EMU_MATRIX_MULTIPLY;
    (matrix ? counts.matrix_ops : counts.simd_ops) += 1;
    for (uint32_t i = first; i < end; ++i) fibres[i].state = READY;
    return true;
}

static void run_simdgroup(uint32_t first, uint32_t end, bool reverse) {
    do {
        for (uint32_t k = first; k < end && !failed; ++k) {
            Fibre& fibre = fibres[reverse ? end - 1 - (k - first) : k];
            if (fibre.state == READY) resume(fibre);
        }
        if (timed_out && !failed) write_failure("timeout", 0, nullptr, "the launch used up its processor time");
    } while (!failed && release_simdgroup(first, end));
}

// False when the threadgroup is done or something failed.
static bool release_barrier() {
    bool all_done = true;
    for (uint32_t i = 0; i < num_fibres; ++i) all_done = all_done && fibres[i].state == DONE;
    if (all_done) return false;
    const Fibre* at = &fibres[0];
    for (uint32_t i = 0; i < num_fibres; ++i) at = fibres[i].state == AT_BARRIER ? &fibres[i] : at;
    for (uint32_t i = 0; i < num_fibres; ++i)
        if (!same_stop(*at, fibres[i])) return report_divergence("barrier-divergence", *at, fibres[i]), false;
    clock_now += 1, counts.barriers += 1;
    if (at->flags & 1) barrier_clock[SPACE_DEVICE] = clock_now;
    if (at->flags & 2) barrier_clock[SPACE_THREADGROUP] = clock_now;
    for (uint32_t i = 0; i < num_fibres; ++i) fibres[i].state = READY;
    return true;
}

static void run_group(const Launch& launch, const uint32_t* group) {
    uint32_t extent[3];
    for (int axis = 0; axis < 3; ++axis) {
        uint32_t left = launch.grid[axis] - group[axis] * launch.group[axis];
        extent[axis] = left < launch.group[axis] ? left : launch.group[axis];
    }
    num_fibres = extent[0] * extent[1] * extent[2];
    clock_now += 1;
    group_start = barrier_clock[0] = barrier_clock[1] = clock_now;
    for (auto& space : simd_clock)
        for (uint32_t& clock : space) clock = clock_now;
    forget_threadgroup_memory();
    for (uint32_t i = 0; i < num_fibres; ++i) prepare(fibres[i], i, launch, group, extent);
    do {
        for (uint32_t first = 0; first < num_fibres && !failed; first += LANES)
            run_simdgroup(first, first + LANES < num_fibres ? first + LANES : num_fibres, launch.reverse);
    } while (!failed && release_barrier());
}

static void on_signal(int number) {
    if (!pthread_equal(pthread_self(), runner)) {
        pthread_kill(runner, number);
        return;
    }
    if (number == SIGVTALRM) {
        timed_out = true;
        if (running) fail("timeout", 0, nullptr, "the launch used up its processor time; does a loop never end?");
        return;
    }
    if (running) fail("stack-overflow", 0, nullptr, "the thread's stack is full, or a bad address was used");
    signal(number, SIG_DFL);
}

} // namespace emu

using namespace emu;

extern "C" {

emu_exchanged emu_exchange(int op, const void* value, uint32_t num_bytes, const void* site) {
    Fibre* self = running;
    uint32_t simdgroup = self->place.simdgroup, first = simdgroup * LANES;
    auto* slot = slots[self->parity][simdgroup];
    self->parity ^= 1;
    memcpy(slot[self->place.lane], value, num_bytes);
    self->op = op, self->site = (const emu_site*)site, self->state = AT_SIMD, self->flags = 0;
    to_scheduler(self);
    uint32_t lanes = num_fibres - first < LANES ? num_fibres - first : LANES;
    return {slot, lanes == 32 ? ~0u : (1u << lanes) - 1, self->place.lane};
}

void emu_barrier(int whole_threadgroup, int flags, const void* site) {
    Fibre* self = running;
    self->op = whole_threadgroup ? EMU_BARRIER : EMU_SIMD_BARRIER;
    self->state = whole_threadgroup ? AT_BARRIER : AT_SIMD;
    self->site = (const emu_site*)site, self->flags = flags;
    to_scheduler(self);
}

void emu_fail(const char* kind, const char* message, const void* site) {
    fail(kind, 0, (const emu_site*)site, "%s", message);
}

const emu_place* emu_where() { return &running->place; }

__attribute__((visibility("default"))) int emu_run(const Launch* launch, Result* out) {
    result = out, failed = timed_out = false, runner = pthread_self();
    counts = Counts{}, clock_now = 0, running = nullptr;
    stack_stride = launch->stack_bytes + 4096;
    uint64_t per_group = (uint64_t)launch->group[0] * launch->group[1] * launch->group[2], all = per_group * stack_stride;
    stacks = (uint8_t*)mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (uint64_t i = 0; i < per_group; ++i) mprotect(stacks + i * stack_stride, 4096, PROT_NONE);
    open_memory(*launch, kernel_buffers);
    static uint8_t signal_stack[65536];
    stack_t ours{signal_stack, 0, sizeof signal_stack}, theirs;
    sigaltstack(&ours, &theirs);
    struct sigaction act {}, was_segv, was_bus, was_alarm;
    act.sa_handler = on_signal, act.sa_flags = SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &act, &was_segv), sigaction(SIGBUS, &act, &was_bus), sigaction(SIGVTALRM, &act, &was_alarm);
    itimerval limit{{0, 0}, {(time_t)launch->seconds, 0}}, off{}, ignored;
    setitimer(ITIMER_VIRTUAL, &limit, &ignored);
    uint32_t groups[3], at[3];
    for (int axis = 0; axis < 3; ++axis) groups[axis] = (launch->grid[axis] + launch->group[axis] - 1) / launch->group[axis];
    for (at[2] = 0; at[2] < groups[2] && !failed; ++at[2])
        for (at[1] = 0; at[1] < groups[1] && !failed; ++at[1])
            for (at[0] = 0; at[0] < groups[0] && !failed; ++at[0]) run_group(*launch, at);
    setitimer(ITIMER_VIRTUAL, &off, nullptr);
    sigaction(SIGSEGV, &was_segv, nullptr), sigaction(SIGBUS, &was_bus, nullptr), sigaction(SIGVTALRM, &was_alarm, nullptr);
    sigaltstack(&theirs, nullptr);
    close_memory(*launch);
    munmap(stacks, all);
    out->counts = counts;
    return failed;
}
}
