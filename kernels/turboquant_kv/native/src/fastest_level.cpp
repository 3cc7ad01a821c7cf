// Prints the fastest level that this CPU can run, as its kernels_*.cpp is called. CMake runs it for
// TURBOQUANT_LEVELS=native; it is no part of the module.
#include <cstdio>

#include "cpu.h"

int main() {
#if defined(__x86_64__)
    std::puts(tq::has_avx512() ? "avx512" : tq::has_avx2() ? "avx2" : "portable");
#elif defined(__aarch64__)
    std::puts(tq::has_dotprod() ? "neon" : "portable");
#else
    std::puts("portable");
#endif
}
