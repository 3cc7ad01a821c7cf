// Goes from one stack to another and back: what fibres are made of, here and in tests/cuda. Not swapcontext, which asks
// the kernel for the signal mask twice each time. For one source file of a library; leaves out scheduling.
#pragma once
#include <string.h>

// Leaves the running stack, whose top goes to *save, for the one whose top is `load`.
extern "C" void emu_switch(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
emu_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");
constexpr int RETURN_WORD = 6, FRAME_WORDS = 8; // the return address sits above the saved registers
#elif defined(__aarch64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
emu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0];   stp x21, x22, [sp, #16];  stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64];  stp x29, x30, [sp, #80];  stp d8, d9, [sp, #96];   stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0];   ldp x21, x22, [sp, #16];  ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64];  ldp x29, x30, [sp, #80];  ldp d8, d9, [sp, #96];   ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
constexpr int RETURN_WORD = 11, FRAME_WORDS = 20;
#else
#error "the emulators' fibres need x86-64 or aarch64"
#endif

// What emu_switch loads to call `begin`, which never returns, on the stack that ends at `high`, a multiple of 16.
inline void* first_frame(void* high, void (*begin)()) {
    void** frame = (void**)high - FRAME_WORDS - 2;
    memset(frame, 0, (FRAME_WORDS + 2) * sizeof(void*));
    frame[RETURN_WORD] = (void*)begin;
    return frame;
}
