// What a compiled kernel and the runtime know of each other. Owns the boundary's names and structs only.
// `emu_site` is what __builtin_source_location() points at: the place of a call in the kernel's own text.
#pragma once
#include <stdint.h>

// What __builtin_source_location() needs, without the whole of <source_location>.
namespace std {
struct source_location {
    struct __impl {
        const char *_M_file_name, *_M_function_name;
        unsigned _M_line, _M_column;
    };
};
} // namespace std

enum emu_op : int {
    EMU_SUM, EMU_PRODUCT, EMU_MAX, EMU_MIN, EMU_AND, EMU_OR, EMU_XOR, EMU_SCAN, EMU_SHUFFLE, EMU_SHUFFLE_XOR,
    EMU_SHUFFLE_UP, EMU_SHUFFLE_DOWN, EMU_SHUFFLE_ROTATE, EMU_BROADCAST, EMU_BROADCAST_FIRST, EMU_BALLOT, EMU_ANY,
    EMU_ALL, EMU_IS_FIRST, EMU_ACTIVE, EMU_MATRIX_LOAD, EMU_MATRIX_STORE, EMU_MATRIX_MULTIPLY, EMU_SIMD_BARRIER,
    EMU_QUAD, EMU_BARRIER, EMU_NUM_OPS
};

struct emu_site {
    const char* file;
    const char* function;
    uint32_t line, column;
};

struct emu_exchanged {
    const unsigned char (*slot)[64]; // one per lane of the simdgroup
    uint32_t active;                 // a bit per lane that exists
    uint32_t lane;
};

struct emu_place {
    uint32_t group[3], local[3], groups[3], group_threads[3], full_group_threads[3], grid[3];
    uint32_t flat, lane, simdgroup, num_simdgroups, num_full_simdgroups;
};

extern "C" {
// Waits until all lanes of the simdgroup are at the same operation, then shows what each brought.
emu_exchanged emu_exchange(int op, const void* value, uint32_t num_bytes, const void* site);
// flags: 1 device memory, 2 threadgroup memory.
void emu_barrier(int whole_threadgroup, int flags, const void* site);
void* emu_threadgroup_alloc(uint32_t id, uint32_t num_bytes, uint32_t align, const char* name);
void emu_note_local(uint32_t id, uint32_t num_bytes);
void emu_atomic(const void* at, uint32_t num_bytes, int writes);
[[noreturn]] void emu_fail(const char* kind, const char* message, const void* site);
const emu_place* emu_where();
}

// Emulation itself is neither watched nor counted.
#if EMU_COUNT
#define EMU_HIDDEN __attribute__((noinline, no_sanitize_coverage))
#else
#define EMU_HIDDEN __attribute__((no_sanitize("thread")))
#endif
#define EMU_SITE const void* site = __builtin_source_location()
