// Every load and store of a kernel arrives here, because it is compiled with -fsanitize=thread and linked against these
// functions in place of a race detector's. Owns buffers, threadgroup memory, and what is known of each byte: who wrote
// it, who read it, and when. Leaves out scheduling.
#include "runtime.h"
#include <initializer_list>
#include <string.h>
#include <sys/mman.h>

// Bounds of this library; hidden, or another library's would be found.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[], _end[];

namespace emu {

constexpr uint64_t PAGE = 4096, GAP = 1 << 20; // no access can stray from one buffer into the next by a small mistake
constexpr uint32_t MAX_REGIONS = 128, THREADGROUP_ARENA = 1 << 20, RED_ZONE = 256;

static Region regions[MAX_REGIONS], shared[MAX_REGIONS];
static uint32_t num_regions, shared_ids[MAX_REGIONS], num_shared;
static uint8_t *arena, *shared_arena;
static uint64_t arena_bytes, shared_used;
static uint16_t* page_region;
static uint8_t local_seen[4096];

static void* reserve(uint64_t bytes) {
    void* got = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return got == MAP_FAILED ? nullptr : got;
}

static uint64_t room(uint64_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE + GAP; }

static void add_buffer(const Buffer& given, uint64_t offset) {
    uint64_t reserved = given.bytes ? given.bytes : 1;
    Region& region = regions[num_regions++];
    region = Region{given.name, arena + offset, given.bytes, given.space, given.writable, nullptr, nullptr};
    if (given.initialised) memcpy(region.base, given.data, given.bytes);
    else memset(region.base, 0xFE, given.bytes);
    if (given.writable) region.cells = (Cell*)reserve(reserved * sizeof(Cell));
    region.touched = (uint8_t*)reserve(reserved);
    for (uint64_t byte = 0; given.writable && given.initialised && byte < given.bytes; ++byte)
        region.cells[byte].written = 1, region.cells[byte].writer = HOST;
    for (uint64_t page = offset / PAGE; page * PAGE < offset + given.bytes; ++page) page_region[page] = num_regions;
}

void open_memory(const Launch& launch, void** kernel_buffers) {
    arena_bytes = GAP;
    for (uint32_t i = 0; i < launch.num_buffers; ++i) arena_bytes += room(launch.buffers[i].bytes);
    arena = (uint8_t*)reserve(arena_bytes);
    page_region = (uint16_t*)reserve(arena_bytes / PAGE * 2 + 2);
    num_regions = num_shared = 0, shared_used = RED_ZONE;
    uint64_t offset = GAP;
    for (uint32_t i = 0; i < launch.num_buffers; ++i) {
        add_buffer(launch.buffers[i], offset);
        kernel_buffers[i] = arena + offset;
        offset += room(launch.buffers[i].bytes);
    }
    shared_arena = (uint8_t*)reserve(THREADGROUP_ARENA);
    memset(local_seen, 0, sizeof local_seen);
}

void close_memory(const Launch& launch) {
    for (uint32_t i = 0; i < num_regions; ++i) {
        Region& region = regions[i];
        if (region.writable) memcpy(launch.buffers[i].data, region.base, region.bytes);
        for (uint64_t byte = 0; byte < region.bytes; ++byte) counts.unique_read_bytes += region.touched[byte];
        uint64_t reserved = region.bytes ? region.bytes : 1;
        if (region.cells) munmap(region.cells, reserved * sizeof(Cell));
        munmap(region.touched, reserved);
    }
    for (uint32_t i = 0; i < num_shared; ++i) munmap(shared[i].cells, shared[i].bytes * sizeof(Cell));
    munmap(arena, arena_bytes), munmap(page_region, arena_bytes / PAGE * 2 + 2), munmap(shared_arena, THREADGROUP_ARENA);
}

void forget_threadgroup_memory() { memset(shared_arena, 0xFE, shared_used); }

static Region* find(uintptr_t at) {
    if (at - (uintptr_t)arena < arena_bytes) {
        uint16_t index = page_region[(at - (uintptr_t)arena) / PAGE];
        return index ? &regions[index - 1] : nullptr;
    }
    for (uint32_t i = 0; i < num_shared; ++i)
        if (at - (uintptr_t)shared[i].base < shared[i].bytes) return &shared[i];
    return nullptr;
}

// The buffer or variable whose edge is closest, to tell what was probably meant.
static const Region* nearest(uintptr_t at) {
    const Region* best = nullptr;
    uint64_t best_distance = ~0ull;
    for (uint32_t i = 0; i < num_regions + num_shared; ++i) {
        const Region* region = i < num_regions ? &regions[i] : &shared[i - num_regions];
        uintptr_t low = (uintptr_t)region->base, high = low + region->bytes;
        uint64_t distance = at < low ? low - at : at - high;
        if (distance < best_distance) best = region, best_distance = distance;
    }
    return best;
}

[[noreturn]] static void outside(uintptr_t at, uint32_t num_bytes, bool writes, uintptr_t code) {
    const Region* region = nearest(at);
    const char* kind = writes ? "out-of-bounds-write" : "out-of-bounds-read";
    long long offset = region ? (long long)(at - (uintptr_t)region->base) : 0;
    if (!region || offset > (1ll << 40) || offset < -(1ll << 40))
        fail(kind, code, nullptr, "%u bytes at a wild address", num_bytes);
    fail(kind, code, nullptr, "%u bytes at byte offset %lld of `%s`, which has %llu bytes (nearest memory)", num_bytes,
         offset, region->name, (unsigned long long)region->bytes);
}

// Whether an access at `when` by thread `who` is ordered before the running thread's next access by a barrier.
static bool ordered(uint32_t when, uint16_t who, int space) {
    if (when < group_start) return false;
    if (when < barrier_clock[space]) return true;
    uint32_t simdgroup = running->place.simdgroup;
    return who / LANES == simdgroup && when < simd_clock[space][simdgroup];
}

[[noreturn]] static void race(const Region* region, uintptr_t at, uint16_t other, const char* what, bool same_group,
                              uintptr_t code) {
    if (same_group)
        fail("race", code, nullptr, "%s by thread %u of the threadgroup, without a barrier, at byte %llu of `%s`", what,
             other, (unsigned long long)(at - (uintptr_t)region->base), region->name);
    fail("race", code, nullptr, "%s by another threadgroup at byte %llu of `%s`", what,
         (unsigned long long)(at - (uintptr_t)region->base), region->name);
}

static void check_read(Region* region, uintptr_t at, Cell& cell, uint16_t me, uintptr_t code) {
    bool threadgroup = region->space == SPACE_THREADGROUP;
    if (!cell.written || (threadgroup && cell.write_clock < group_start))
        fail("uninitialised-read", code, nullptr, "byte %llu of `%s` was never written",
             (unsigned long long)(at - (uintptr_t)region->base), region->name);
    bool same_group = cell.write_clock >= group_start;
    if (cell.writer < HOST && (cell.writer != me || !same_group) && !ordered(cell.write_clock, cell.writer, region->space))
        race(region, at, cell.writer, "reads what was written", same_group, code);
    if (cell.read_clock < group_start || ordered(cell.read_clock, cell.reader, region->space))
        cell.reader = cell.other_reader = me;
    else if (cell.reader != me) cell.other_reader = me;
    cell.read_clock = clock_now;
}

static void check_write(Region* region, uintptr_t at, Cell& cell, uint16_t me, uintptr_t code) {
    bool threadgroup = region->space == SPACE_THREADGROUP, same_group = cell.write_clock >= group_start;
    bool live = cell.written && cell.writer < HOST && (same_group || !threadgroup);
    if (live && (cell.writer != me || !same_group) && !ordered(cell.write_clock, cell.writer, region->space))
        race(region, at, cell.writer, "overwrites what was written", same_group, code);
    bool read_here = cell.read_clock >= group_start;
    for (uint16_t reader : {cell.reader, cell.other_reader})
        if (read_here && reader != me && !ordered(cell.read_clock, reader, region->space))
            race(region, at, reader, "overwrites what was read", true, code);
    cell.write_clock = clock_now, cell.writer = me, cell.written = 1;
}

// Constants of the kernel's own text live in the library's image.
static bool in_image(uintptr_t at) { return at >= (uintptr_t)__ehdr_start && at < (uintptr_t)_end; }

static void access(uintptr_t at, uint32_t num_bytes, bool writes, bool aligned, uintptr_t code) {
    if (!running || (at >= running->stack_low && at < running->stack_high)) return;
    Region* region = find(at);
    if (!region) {
        if (in_image(at)) return;
        outside(at, num_bytes, writes, code);
    }
    if (at - (uintptr_t)region->base + num_bytes > region->bytes) outside(at, num_bytes, writes, code);
    if (aligned && (at & (num_bytes - 1)))
        fail("misaligned", code, nullptr, "%u bytes at byte %llu of `%s`", num_bytes,
             (unsigned long long)(at - (uintptr_t)region->base), region->name);
    if (writes && !region->writable)
        fail("write-to-constant", code, nullptr, "`%s` is an input", region->name);
    uint64_t offset = at - (uintptr_t)region->base;
    (writes ? counts.writes : counts.reads)[region->space] += 1;
    (writes ? counts.write_bytes : counts.read_bytes)[region->space] += num_bytes;
    if (region->touched && !writes) memset(region->touched + offset, 1, num_bytes);
    uint16_t me = (uint16_t)running->place.flat;
    for (uint32_t i = 0; region->cells && i < num_bytes; ++i)
        (writes ? check_write : check_read)(region, at + i, region->cells[offset + i], me, code);
}

} // namespace emu

using namespace emu;

extern "C" {

#define HERE (uintptr_t) __builtin_return_address(0)
#define HOOK(n)                                                                                         \
    void __tsan_read##n(void* at) { access((uintptr_t)at, n, false, true, HERE); }                      \
    void __tsan_write##n(void* at) { access((uintptr_t)at, n, true, true, HERE); }                      \
    void __tsan_unaligned_read##n(void* at) { access((uintptr_t)at, n, false, false, HERE); }           \
    void __tsan_unaligned_write##n(void* at) { access((uintptr_t)at, n, true, false, HERE); }           \
    void __tsan_volatile_read##n(void* at) { access((uintptr_t)at, n, false, true, HERE); }             \
    void __tsan_volatile_write##n(void* at) { access((uintptr_t)at, n, true, true, HERE); }
HOOK(1) HOOK(2) HOOK(4) HOOK(8) HOOK(16)
void __tsan_read_range(void* at, uint64_t n) { access((uintptr_t)at, (uint32_t)n, false, false, HERE); }
void __tsan_write_range(void* at, uint64_t n) { access((uintptr_t)at, (uint32_t)n, true, false, HERE); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void) {}
void __tsan_init(void) {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}

struct UbPlace { const char* file; uint32_t line, column; };
#define UB(name, kind, text)                                                                            \
    [[noreturn]] void __ubsan_handle_##name##_abort(UbPlace* at, uintptr_t value) {                     \
        emu_site site{at->file, "", at->line, at->column};                                              \
        fail(kind, 0, &site, text, (long long)value);                                                   \
    }
UB(out_of_bounds, "index-out-of-bounds", "index %lld")
UB(shift_out_of_bounds, "bad-shift", "shift of %lld by at least the type's width or by less than nothing")
UB(divrem_overflow, "division-by-zero", "%lld divided by zero")
[[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(UbPlace* at, uintptr_t pointer) {
    emu_site site{at->file, "", at->line, at->column};
    fail("misaligned", 0, &site, "an address ending in %llx is not aligned for its type", (unsigned long long)pointer & 0xff);
}
[[noreturn]] void __ubsan_handle_builtin_unreachable(UbPlace* at) {
    emu_site site{at->file, "", at->line, at->column};
    fail("deadlock", 0, &site, "unreachable code was reached");
}

// Not counted as races: atomics order themselves.
void emu_atomic(const void* pointer, uint32_t num_bytes, int writes) {
    uintptr_t at = (uintptr_t)pointer;
    Region* region = find(at);
    if (!region || at - (uintptr_t)region->base + num_bytes > region->bytes) outside(at, num_bytes, writes, HERE);
    if (writes && !region->writable) fail("write-to-constant", HERE, nullptr, "`%s` is an input", region->name);
    counts.atomics += 1;
    for (uint32_t i = 0; region->cells && i < num_bytes; ++i) {
        Cell& cell = region->cells[at - (uintptr_t)region->base + i];
        if (writes != 2 && (!cell.written || (region->space == SPACE_THREADGROUP && cell.write_clock < group_start)))
            fail("uninitialised-read", HERE, nullptr, "atomic operation on `%s`, which was never written", region->name);
        if (writes) cell.written = 1, cell.writer = HOST, cell.write_clock = clock_now;
    }
}

void* emu_threadgroup_alloc(uint32_t id, uint32_t num_bytes, uint32_t align, const char* name) {
    for (uint32_t i = 0; i < num_shared; ++i)
        if (shared_ids[i] == id) return shared[i].base;
    uint32_t step = align > 16 ? align : 16;
    uint64_t at = (shared_used + RED_ZONE + step - 1) / step * step;
    counts.threadgroup_bytes += (num_bytes + 15) / 16 * 16;
    if (counts.threadgroup_bytes > 32768 || num_shared == MAX_REGIONS)
        fail("limit", HERE, nullptr, "`%s` brings threadgroup memory to %llu bytes; the limit is 32768", name,
             (unsigned long long)counts.threadgroup_bytes);
    Cell* cells = (Cell*)reserve(num_bytes * sizeof(Cell));
    shared[num_shared] = Region{name, shared_arena + at, num_bytes, SPACE_THREADGROUP, 1, cells, nullptr};
    shared_ids[num_shared] = id;
    shared_used = at + num_bytes;
    return shared[num_shared++].base;
}

void emu_note_local(uint32_t id, uint32_t num_bytes) {
    if (id < sizeof local_seen && !local_seen[id]) local_seen[id] = 1, counts.local_bytes += num_bytes;
}
}
