// Every level of this build against the portable one, without Python: what runs under an emulator for another CPU.
// `make emulate` builds and runs it for NEON.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "dispatch.h"

namespace {

std::mt19937 rng(7);
std::vector<float> gaussian(std::size_t count) {
    std::normal_distribution<float> draw;
    std::vector<float> x(count);
    for (float& v : x) v = draw(rng);
    return x;
}

constexpr int kSink = 5, kPage = 48;

tq::Side make_side(bool is_key, int dim, int kind, bool turns, const tq::KernelTable& level) {
    tq::Side side;
    side.is_key = is_key, side.dim = dim, side.bits = tq::bits_of(kind), side.is_trellis = tq::is_trellis(kind);
    const int entries = 1 << side.index_bits();
    side.signs.assign(dim, 1.0f);
    side.base_order = 1;
    while (((dim / side.base_order) & (dim / side.base_order - 1)) || dim % side.base_order) side.base_order++;
    side.base.assign(side.base_order * side.base_order, 0.0f);
    for (int i = 0; i < side.base_order; i++) side.base[i * side.base_order + i] = 1.0f; // any matrix serves a comparison
    for (int i = 0; i < entries; i++) side.book.push_back(2.7f * std::sin(1.5f * ((i + 0.5f) * 2 / entries - 1)));
    for (int i = 0; !side.is_trellis && i + 1 < entries; i++) side.thresholds.push_back((side.book[i] + side.book[i + 1]) / 2);
    side.mean = std::vector<float>(2 * dim, 0.1f);
    if (is_key && turns) { // neighbours are pairs, the last quarter of the dims stays
        std::vector<double> frequencies;
        for (int j = 0; j < dim * 3 / 8; j++) frequencies.push_back(std::pow(10000.0, -j / (dim * 3 / 8.0)));
        side.turning = tq::make_turning(2, dim, std::vector<double>(2 * dim, 2.0), frequencies, 2, 1);
        for (int d = 0; d < 2 * dim; d++) side.mean[d] = d % dim < dim * 3 / 8 * 2 ? 0.0f : 2.0f;
        tq::grow_spans(side.turning, kSink, 100);
    }
    side.table = tq::make_table(side, level);
    return side;
}

long num_encoded = 0, num_differing = 0; // bytes of pages; a code by a threshold may round to its neighbour

// One side of one page, by the portable kernels; the level's own encoding is compared.
void encode(const tq::KernelTable& level, const tq::Store& store, const tq::Side& side, const tq::Rows& rows, int head, int first, std::int64_t page) {
    std::uint8_t* codes = store.codes(side, page, head);
    std::vector<std::uint8_t> own(store.code_bytes(side)), scales(store.scale_bytes());
    std::vector<float> means(std::size_t(2) * side.dim * store.groups_per_page());
    tq::Centre centre{&side.mean[std::size_t(head) * side.dim], 0};
    if (side.turning.num_pairs) {
        centre = {&means[std::size_t(head) * side.dim], 2 * side.dim};
        for (int g = 0; g < store.groups_per_page(); g++)
            tq::block_means(side.turning, 2, side.dim, first + 16 * g + 7.5, &means[std::size_t(2) * g * side.dim], side.dim);
    }
    tq::portable_kernels()->encode_page(store, side, rows, head, first, centre, codes, store.scales(side, page, head));
    level.encode_page(store, side, rows, head, first, centre, own.data(), scales.data());
    num_encoded += long(own.size());
    for (std::size_t i = 0; i < own.size(); i++) num_differing += own[i] != codes[i];
}

// Two KV heads, one sequence: encode its pages, attend with `num_rows` last rows. Returns the output.
std::vector<float> run(const tq::KernelTable& level, int dim, int kind, bool turns, int group, int num_rows, const std::vector<float>& data) {
    tq::Store store;
    store.heads = 2, store.page_tokens = kPage, store.sink_tokens = kSink;
    store.k = make_side(true, dim, kind, turns, level), store.v = make_side(false, dim, kind, turns, level);
    const int num_pages = 12, tokens = kSink + num_pages * kPage + 9;
    store.grow(num_pages);
    const tq::Rows rows{data.data(), std::int64_t(tokens) * dim, dim, tq::Dtype::f32, tokens};
    std::vector<std::int64_t> pages;
    for (int i = 0; i < num_pages; i++) {
        pages.push_back(num_pages - 1 - i);
        for (int head = 0; head < 2; head++) {
            encode(level, store, store.k, rows, head, kSink + i * kPage, pages[i]);
            encode(level, store, store.v, rows, head, kSink + i * kPage, pages[i]);
        }
    }
    tq::Attention a;
    const int heads = 2 * group;
    std::vector<float> out(std::size_t(heads) * num_rows * dim);
    a.store = &store, a.q = data.data(), a.q_strides[1] = std::int64_t(num_rows) * dim, a.q_strides[2] = dim;
    a.out = out.data(), a.num_q_heads = heads, a.num_rows = num_rows, a.group = group;
    a.scale = 1.0f / std::sqrt(float(dim)), a.segment_pages = 5;
    tq::Item item;
    item.num_rows = num_rows, item.position = tokens - num_rows, item.pages = pages.data(), item.num_pages = num_pages;
    item.sink_k = item.sink_v = {data.data(), rows.head_stride, dim, tq::Dtype::f32, kSink};
    item.window_start = tokens - 9;
    item.window_k = item.window_v = {data.data() + std::size_t(item.window_start) * dim, rows.head_stride, dim, tq::Dtype::f32, 9};
    item.num_segments = 3;
    for (int head = 0; head < 2; head++) {
        if (num_rows > tq::kDecodeRows) {
            std::vector<float> scratch(level.prefill_scratch(a));
            level.prefill(a, item, head, scratch.data());
            continue;
        }
        std::vector<float> scratch(level.decode_scratch(a)), partials(level.partial_floats(a, item));
        for (int s = 0; s < 3; s++) level.decode_segment(a, item, head, s, partials.data(), scratch.data());
        level.merge_segments(a, item, head, partials.data(), scratch.data());
    }
    return out;
}

// The matrix as floats, a part at a time.
void add_dense(const tq::KernelTable& level, const tq::Matrix& w, std::vector<float>& to) {
    for (int from = 0; from < w.num_in; from += w.num_in / 2) {
        std::vector<float> part(std::size_t(w.num_out - 1) * w.num_in / 2);
        level.linear.dense(w, 1, w.num_out, from, from + w.num_in / 2, part.data());
        to.insert(to.end(), part.begin(), part.end());
    }
}

// A linear layer's product with codes of `bits` bits in groups of `group`, and its weights; bits 0: of float16 numbers.
std::vector<float> multiply(const tq::KernelTable& level, int bits, int group, int num_rows, const std::vector<float>& x, std::mt19937 draw) {
    tq::Matrix w;
    w.num_out = 7, w.num_in = int(x.size()) / num_rows, w.bits = bits, w.group = group;
    std::vector<std::uint8_t> codes(std::size_t(w.num_out) * w.num_in * 2);
    for (auto& byte : codes) byte = std::uint8_t(draw());
    std::vector<float> y(std::size_t(num_rows) * w.num_out);
    if (bits == 0) {
        for (std::size_t i = 1; i < codes.size(); i += 2) codes[i] = std::uint8_t((codes[i] & 0x83) | 0x30); // of moderate size
        w.floats = codes.data(), w.dtype = tq::Dtype::f16;
        std::vector<float> scratch(level.linear.product_scratch(w));
        level.linear.float_product(w, x.data(), num_rows, 0, w.num_out, {y.data(), std::size_t(w.num_out), 0}, scratch.data());
        add_dense(level, w, y);
        return y;
    }
    std::vector<float> scales, biases;
    for (int i = 0; i < w.num_out * w.num_groups(); i++) scales.push_back(0.01f + 1e-4f * (i % 50)), biases.push_back(-0.3f + 1e-2f * (i % 7));
    w.codes = codes.data(), w.scales = scales.data(), w.biases = biases.data(), w.dtype = tq::Dtype::f32;
    w.nibbles = bits == 4 && level.linear.nibbles;
    tq::Inputs inputs;
    inputs.num_in = w.num_in, inputs.nibbles = w.nibbles;
    std::vector<std::int16_t> rounded(std::size_t(num_rows) * inputs.row_codes());
    std::vector<float> floats(std::size_t(2) * num_rows * w.padded_blocks()), scratch(level.linear.product_scratch(w));
    inputs.num_rows = num_rows, inputs.padded_blocks = w.padded_blocks(), inputs.codes = rounded.data();
    inputs.scales = floats.data(), inputs.sums = floats.data() + std::size_t(num_rows) * w.padded_blocks();
    for (int m = 0; m < num_rows; m++) level.linear.round_row(&x[std::size_t(m) * w.num_in], w.block(), inputs, m);
    level.linear.product(w, inputs, 0, w.num_out, {y.data(), std::size_t(w.num_out), 0}, scratch.data());
    add_dense(level, w, y);
    return y;
}

// All that stands between a decoder layer's products, of rows whose width is no multiple of a register.
std::vector<float> between_products(const tq::KernelTable& level, int width, const std::vector<float>& x) {
    const tq::BlockTable& kernels = level.blocks;
    std::vector<float> all;
    auto add = [&](const std::vector<float>& row) { all.insert(all.end(), row.begin(), row.end()); };
    std::vector<float> row(x.begin(), x.begin() + width), other(x.begin() + width, x.begin() + 2 * width), out(width);
    kernels.norm_row(row.data(), other.data(), width, 1e-5f, out.data());
    add(out);
    for (bool interleaved : {false, true})
        for (int pairs : {width / 2, width / 4, 0}) {
            kernels.turn_row(row.data(), other.data(), width, pairs, interleaved ? 2 : 1, interleaved ? 1 : pairs, out.data());
            add(out);
        }
    kernels.add_row(row.data(), other.data(), width, out.data());
    add(out);
    for (float& v : row) v *= 40; // beyond where a power of e is a float
    kernels.gate_row(row.data(), other.data(), width);
    add(row);
    return all;
}

double distance(const std::vector<float>& got, const std::vector<float>& want) {
    double error = 0, norm = 0;
    for (std::size_t i = 0; i < want.size(); i++) {
        error += double(got[i] - want[i]) * (got[i] - want[i]);
        norm += double(want[i]) * want[i];
    }
    return norm > 0 ? std::sqrt(error / norm) : 1.0;
}

} // namespace

int main() {
    int failures = 0, compared = 0;
    for (const auto* level : tq::available_levels())
        for (int bits : {0, 2, 3, 4, 5, 6, 8})
            for (int group : {32, 64, 128})
                for (int num_rows : {1, 5, 13}) {
                    const auto x = gaussian(std::size_t(num_rows) * 2304);
                    const std::mt19937 draw(bits * 100 + group);
                    const double far = distance(multiply(*level, bits, group, num_rows, x, draw),
                                                multiply(*tq::portable_kernels(), bits, group, num_rows, x, draw));
                    compared++;
                    if (far < 1e-4) continue; // orders of summing, and an input between two steps
                    std::printf("%s linear bits=%d group=%d rows=%d: %g\n", level->name, bits, group, num_rows, far);
                    failures++;
                }
    for (const auto* level : tq::available_levels())
        for (int width : {1, 7, 64, 90, 576}) {
            const auto x = gaussian(std::size_t(2) * width);
            const double far = distance(between_products(*level, width, x), between_products(*tq::portable_kernels(), width, x));
            compared++;
            if (far < 1e-6) continue;
            std::printf("%s between products width=%d: %g\n", level->name, width, far);
            failures++;
        }
    for (const auto* level : tq::available_levels())
        for (int dim : {64, 80, 112, 128, 256})
            for (int kind : {2, 3, 4, 8, tq::kTrellis + 2, tq::kTrellis + 3, tq::kTrellis + 4})
                for (int group : {1, 4, 7})
                    for (int num_rows : {1, 9}) {
                        const bool turns = group != 4;
                        const auto data = gaussian(std::size_t(2) * 700 * dim);
                        const auto want = run(*tq::portable_kernels(), dim, kind, turns, group, num_rows, data);
                        const auto got = run(*level, dim, kind, turns, group, num_rows, data);
                        const double far = distance(got, want);
                        compared++;
                        // Both levels' integer roundings, of 8 or 16 bits; float tiles differ by orders of summing.
                        const double tolerance = num_rows > 1 ? 1e-5 : kind == 8 ? 5e-5 : 2e-2;
                        const bool good = far < tolerance;
                        if (!good) std::printf("%s D=%d kind=%d G=%d T=%d: %g\n", level->name, dim, kind, group, num_rows, far);
                        failures += !good;
                    }
    std::printf("%d comparisons, %d failures, fastest level %s\n", compared, failures, tq::available_levels().front()->name);
    std::printf("%ld of %ld encoded bytes differ from the portable level's\n", num_differing, num_encoded);
    return failures != 0 || num_differing > num_encoded / 10000;
}
