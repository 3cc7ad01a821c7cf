// The runtime's own state, shared by memory.cpp (regions, shadow, checks) and fibres.cpp (scheduling).
// One launch at a time; everything is reset by emu_run.
#pragma once
#include "hooks.h"
#include <stddef.h>

namespace emu {

constexpr uint16_t NOBODY = 0xffff, HOST = 0xfffe;
constexpr int MAX_THREADS = 1024, LANES = 32, SPACE_DEVICE = 0, SPACE_THREADGROUP = 1, SPACE_CONSTANT = 2;

// Last write and last two readers of a byte, each with the clock then.
struct Cell {
    uint32_t write_clock, read_clock;
    uint16_t writer, reader, other_reader;
    uint8_t written, pad;
};

struct Region {
    const char* name;
    uint8_t* base;
    uint64_t bytes;
    int space, writable;
    Cell* cells;      // writable regions only
    uint8_t* touched; // which bytes were ever read
};

// What Python fills in; the same order as in launch.py.
struct Buffer {
    void* data;
    const char* name;
    uint64_t bytes;
    int32_t space, writable, initialised, atomic;
};

struct Launch {
    const Buffer* buffers;
    uint32_t num_buffers, grid[3], group[3];
    uint32_t stack_bytes, seconds, reverse;
};

struct Counts {
    uint64_t reads[3], read_bytes[3], writes[3], write_bytes[3], unique_read_bytes, atomics, simd_ops, matrix_ops,
        barriers, threadgroup_bytes, local_bytes;
};

struct Result {
    Counts counts;
    uint64_t code_offset; // of the failing access, for addr2line; 0 if the message has its line already
    char kind[64], message[960];
};

enum State : uint8_t { READY, AT_SIMD, AT_BARRIER, DONE };

struct Fibre {
    void* stack_pointer;
    uintptr_t stack_low, stack_high;
    State state;
    uint8_t parity;
    int op, flags;
    const emu_site* site;
    emu_place place;
};

extern Fibre fibres[MAX_THREADS];
extern Fibre* running; // null while the scheduler itself runs
extern uint32_t num_fibres, clock_now, group_start, barrier_clock[2], simd_clock[2][LANES], group_number;
extern Counts counts;
extern Result* result;

void open_memory(const Launch& launch, void** kernel_buffers);
void close_memory(const Launch& launch);
void forget_threadgroup_memory();
// Records the failure and leaves the fibre for good.
[[noreturn]] void fail(const char* kind, uintptr_t code, const emu_site* site, const char* format, ...);

} // namespace emu
