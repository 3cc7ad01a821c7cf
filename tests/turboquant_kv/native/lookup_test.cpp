// The 256-entry table look-up of one instruction-set level against plain indexing: every index, in every lane, exactly.
//
// Built with the level's own flags and -DLEVEL='"isa_neon.h"'; `make emulate` does. test_levels.py looks up all entries on
// the levels that a CPU has.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>

#include "store.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace tq {
#include LEVEL
} // namespace tq

int main() {
    std::mt19937 rng(std::random_device{}());
    std::uint8_t table[256], index[4 * LANES], got[4 * LANES];
    int failures = 0;
    for (int round = 0; round < 200; round++) {
        for (auto& entry : table) entry = std::uint8_t(rng());
        const auto lut = tq::Lut256::make(table);
        for (int first = 0; first < 256; first++) {
            for (int lane = 0; lane < 4 * LANES; lane++) index[lane] = std::uint8_t(first + (round % 2 ? 67 : 1) * lane);
            tq::store_to(got, tq::look_up_256(lut, tq::load<tq::B4>(index)));
            for (int lane = 0; lane < 4 * LANES; lane++) failures += got[lane] != table[index[lane]];
        }
    }
    std::printf("%s: %d wrong look-ups\n", tq::kName, failures);
    return failures != 0;
}
