// See dispatch.h.
#include "dispatch.h"

#include <cmath>

#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace tq {
namespace {

bool has_avx512() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
#else
    return false;
#endif
}

bool has_avx2() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return false;
#endif
}

bool has_dotprod() {
#if defined(__linux__) && defined(__aarch64__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true; // every Apple CPU that runs MLX
#endif
}

// Mean squared error of the entries under the centroids' own probabilities; fills `table`.
double fit(const Side& side, int low, int high, double offset, double step, IntTable& table) {
    double error = 0;
    const int n = int(side.book.size());
    for (int i = 0; i < n; i++) {
        const double c = side.book[i];
        long entry = std::lround(offset + c / step);
        entry = entry < low ? low : entry > high ? high : entry;
        const double gap = i + 1 < n ? side.book[i + 1] - c : c - side.book[i - 1];
        const double miss = (entry - offset) * step - c;
        error += std::exp(-c * c / 2) * gap * miss * miss;
        table.entry[i] = std::uint8_t(entry);
    }
    table.step = float(step);
    table.offset = float(offset);
    return error;
}

// The best scale for few centroids is not the one that fills the range: search it.
IntTable fitted_table(const Side& side, int low, int high) {
    IntTable table, best;
    double least = -1;
    const double largest = side.book.back(), middle = (low + high) / 2.0;
    const double half = (high - low) / 2.0;
    for (int i = 0; i <= 2000; i++) {
        const double step = largest / half * (1.0 + i / 2000.0);
        for (double offset : {middle, std::floor(middle)}) {
            const double error = fit(side, low, high, offset, step, table);
            if (least < 0 || error < least) least = error, best = table;
        }
    }
    const int mask = int(side.book.size()) - 1;
    for (int i = 0; i < 256; i++) best.entry[i] = best.entry[i & mask];
    return best;
}

IntTable wide_table(const Side& side) {
    IntTable table;
    table.step = side.book.back() / 32512.0f;
    for (int i = 0; i < 256; i++) {
        const long c = std::lround(side.book[i] / table.step);
        if (side.is_key) {
            table.entry[i] = std::uint8_t((c + 32768) >> 8);
            table.low[i] = std::uint8_t((c + 32768) & 255);
        } else {
            const long high = (c + 128) >> 8;
            table.entry[i] = std::uint8_t(high);
            table.low[i] = std::uint8_t(c - 256 * high);
        }
    }
    return table;
}

} // namespace

std::vector<const KernelTable*> available_levels() {
    std::vector<const KernelTable*> levels;
    if (const auto* level = avx512_kernels(); level && has_avx512()) levels.push_back(level);
    if (const auto* level = avx2_kernels(); level && has_avx2()) levels.push_back(level);
    if (const auto* level = neon_kernels(); level && has_dotprod()) levels.push_back(level);
    levels.push_back(portable_kernels());
    return levels;
}

const KernelTable* find_level(const std::string& name) {
    const auto levels = available_levels();
    if (name.empty() || name == "auto") return levels.front();
    std::string names;
    for (const auto* level : levels) {
        if (name == level->name) return level;
        names += std::string(names.empty() ? "" : ", ") + level->name;
    }
    throw std::invalid_argument("instruction set '" + name + "' is not available; this CPU and build have " + names);
}

IntTable make_table(const Side& side, const KernelTable& level) {
    if (side.bits == 8) return wide_table(side);
    return side.is_key ? fitted_table(side, level.k_low, level.k_high) : fitted_table(side, level.v_low, level.v_high);
}

} // namespace tq
