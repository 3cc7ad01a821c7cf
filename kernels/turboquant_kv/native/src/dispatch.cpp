// See dispatch.h.
#include "dispatch.h"

#include <cmath>
#include <utility>

#include "cpu.h"

namespace tq {
namespace {

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

Turning make_turning(int heads, int dim, std::vector<double> mean, std::vector<double> frequencies, int stride, int gap) {
    Turning t;
    t.num_pairs = int(frequencies.size());
    t.padded = (t.num_pairs + 15) / 16 * 16;
    t.stride = stride, t.gap = gap;
    t.first.assign(std::size_t(heads) * t.padded, 0.0f);
    t.second = t.first;
    t.starts.assign(std::size_t(kSpanBlocks) * 2 * t.padded, 0.0f);
    t.blocks.assign(std::size_t(16) * t.padded, 0.0f);
    for (int j = 0; j < t.num_pairs; j++) {
        for (int h = 0; h < heads; h++) {
            t.first[std::size_t(h) * t.padded + j] = float(mean[std::size_t(h) * dim + stride * j]);
            t.second[std::size_t(h) * t.padded + j] = float(mean[std::size_t(h) * dim + stride * j + gap]);
        }
        const double f = frequencies[j], to_middle = (kSpanBlocks * kGroupTokens - 1) / 2.0;
        for (int b = 0; b < kSpanBlocks; b++) {
            t.starts[std::size_t(2 * b) * t.padded + j] = float(std::cos(f * (kGroupTokens * b + to_middle)));
            t.starts[std::size_t(2 * b + 1) * t.padded + j] = float(std::sin(f * (kGroupTokens * b + to_middle)));
        }
        for (int k = 0; k < kSpanBlocks / 2; k++) {
            t.blocks[16 * j + 2 * k] = float(std::cos(f * kGroupTokens * (k + 0.5)));
            t.blocks[16 * j + 2 * k + 1] = float(std::sin(f * kGroupTokens * (k + 0.5)));
        }
    }
    t.mean = std::move(mean);
    t.frequencies = std::move(frequencies);
    return t;
}

void grow_spans(Turning& t, int sink_tokens, std::int64_t num_blocks) {
    const std::size_t row = std::size_t(2) * t.padded, held = t.num_pairs ? t.spans.size() / row : 0, needed = num_blocks / kSpanBlocks + 1;
    if (t.num_pairs == 0 || needed <= held) return;
    t.spans.resize((needed + needed / 4) * row);
    for (std::size_t n = held; n < t.spans.size() / row; n++)
        for (int j = 0; j < t.num_pairs; j++) {
            const double angle = t.frequencies[j] * (sink_tokens + double(kSpanBlocks * kGroupTokens) * n);
            t.spans[n * row + j] = float(std::cos(angle));
            t.spans[n * row + t.padded + j] = float(std::sin(angle));
        }
}

void block_means(const Turning& t, int heads, int dim, double position, float* out, std::int64_t head_stride) {
    for (int h = 0; h < heads; h++)
        for (int d = 0; d < dim; d++) out[h * head_stride + d] = float(t.mean[std::size_t(h) * dim + d]);
    for (int j = 0; j < t.num_pairs; j++) {
        const double c = std::cos(t.frequencies[j] * position), s = std::sin(t.frequencies[j] * position);
        for (int h = 0; h < heads; h++) {
            const int a = t.stride * j, b = a + t.gap;
            const double *mean = &t.mean[std::size_t(h) * dim], first = mean[a], second = mean[b];
            out[h * head_stride + a] = float(first * c - second * s);
            out[h * head_stride + b] = float(first * s + second * c);
        }
    }
}

std::vector<const KernelTable*> available_levels() {
    std::vector<const KernelTable*> levels;
    if (const auto* level = avx512_kernels(); level && has_avx512()) levels.push_back(level);
    if (const auto* level = avx2_kernels(); level && has_avx2()) levels.push_back(level);
    if (const auto* level = neon_kernels(); level && has_dotprod()) levels.push_back(level);
    if (const auto* level = portable_kernels()) levels.push_back(level);
    return levels;
}

const KernelTable* find_level(const std::string& name) {
    const auto levels = available_levels();
    if (!levels.empty() && (name.empty() || name == "auto")) return levels.front();
    std::string names;
    for (const auto* level : levels) {
        if (name == level->name) return level;
        names += std::string(names.empty() ? "" : ", ") + level->name;
    }
    const char* hint = levels.size() == 1 ? "; a build with LEVELS=all has the others" : "";
    throw std::invalid_argument("instruction set '" + name + "' is not available; this CPU and build have " + names + hint);
}

IntTable make_table(const Side& side, const KernelTable& level) {
    if (side.bits == 8) return wide_table(side);
    IntTable table = side.is_key ? fitted_table(side, level.k_low, level.k_high) : fitted_table(side, level.v_low, level.v_high);
    if (side.is_trellis)
        for (int j = 0; j < 4; j++)
            for (int x = 0; x < 64; x++) { // an index of two vectors' h, l and first own bits; the others have the other vector's bits
                const int mine = j % 2, other = 1 - mine, low = x >> (2 + mine) & 1, high = x >> mine & 1, own = x >> (4 + mine) & 1;
                const int second = x >> (side.bits == 3 ? j ^ 1 : other) & 1, third = x >> (4 + other) & 1;
                const int above = side.bits == 2 ? 0 : side.bits == 3 ? second : third << 1 | second;
                table.window[j][x] = table.entry[above << 3 | own << 2 | high << 1 | low];
            }
    return table;
}

} // namespace tq
