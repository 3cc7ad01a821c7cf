// Linear layers of one instruction-set level; see linear_jobs.h.
//
// A few outputs' codes are unpacked to words, once for all rows of x; then come tiles of these outputs times a few rows, so
// that each word and each input that is loaded is used several times.

#if LANES == 16
constexpr int kTileOut = 4, kTileRows = 4;
#elif LANES == 8
constexpr int kTileOut = 2, kTileRows = 4;
#else
constexpr int kTileOut = 4, kTileRows = 4;
#endif
constexpr int kChunkUnits = 32; // units whose factors are made at a time: they stay in the first-level cache

TQ_INLINE F load_as(const void* p, std::size_t at, Dtype dtype) {
    if (dtype == Dtype::f32) return load<F>(static_cast<const float*>(p) + at);
    const auto* words = static_cast<const std::uint16_t*>(p) + at;
    if (dtype == Dtype::f16) return load_half(words);
    return (F)(__builtin_convertvector(load<H>(words), U) << 16);
}

TQ_INLINE float float_at(const void* p, std::size_t at, Dtype dtype) {
    if (dtype == Dtype::f32) return static_cast<const float*>(p)[at];
    const std::uint16_t word = static_cast<const std::uint16_t*>(p)[at];
    return dtype == Dtype::f16 ? half_to_float(word) : bf16_to_float(word);
}

// A power of two from its exponent with the bias of a float32.
TQ_INLINE float exponent_to_float(std::uint8_t exponent) {
    const std::uint32_t bits = std::uint32_t(exponent) << 23;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// One row of W as it stands, (num_in,): what a table of embeddings is asked for.
static void table_row(const Matrix& w, int n, float* out) {
    const std::size_t start = std::size_t(n) * w.num_in;
    if (w.bits == 0) {
        for (int k = 0; k < w.num_in; k++) out[k] = float_at(w.floats, start + k, w.dtype);
        return;
    }
    const std::uint8_t* codes = w.codes + start / 8 * w.bits;
    const std::size_t groups = std::size_t(n) * w.num_groups();
    for (int k = 0; k < w.num_in; k += 8) { // eight codes are as many bytes as a code has bits
        std::uint64_t eight = 0;
        std::memcpy(&eight, codes + std::size_t(k) / 8 * w.bits, w.bits);
        if (w.is_mxfp4) {
            const float scale = exponent_to_float(static_cast<const std::uint8_t*>(w.scales)[groups + k / w.group]) * 0.5f;
            for (int i = 0; i < 8; i++) out[k + i] = scale * (float(kFp4[eight >> (4 * i) & 15]) - kFp4Zero);
            continue;
        }
        const float scale = float_at(w.scales, groups + k / w.group, w.dtype), bias = float_at(w.biases, groups + k / w.group, w.dtype);
        for (int i = 0; i < 8; i++) out[k + i] = scale * float(eight >> (i * w.bits) & ((1 << w.bits) - 1)) + bias;
    }
}

#if defined(TQ_BYTE_PRODUCTS)
#include "linear_bytes.h"
#else
#include "linear_words.h"
#endif

// Rounded to 16 bits, block by block, to the nearest of equal steps between minus and plus the block's largest.
static void round_row(const float* x, int block, const Inputs& to, int row) {
    std::int16_t* codes = to.codes + std::size_t(row) * to.row_codes();
    float *scales = to.scales + std::size_t(row) * to.padded_blocks, *sums = to.sums + std::size_t(row) * to.padded_blocks;
    const int num_blocks = to.num_in / block;
    for (int b = 0; b < num_blocks; b++) {
        const float* from = x + b * block;
        F most{}, total{};
        for (int i = 0; i < block; i += LANES) {
            const F v = load<F>(from + i), size = v < 0.0f ? -v : v;
            most = vmax(most, size);
            total = total + (v - v); // 0, but NaN where a value is none or infinite
        }
        const float largest = maximum(most), scale = largest / float(kInputLimit) + sum(total);
        const F inverse = splat(largest > 0.0f ? float(kInputLimit) / largest : 0.0f);
        U codes_sum{}; // codes of what is no number may be any
        for (int i = 0; i < block; i += LANES) {
            const I c = round_to_int(load<F>(from + i) * inverse);
            codes_sum += (U)c;
            to.pairs ? store_pair_inputs(codes, b * block + i, c) : store_inputs(codes, b * block + i, c);
        }
        std::uint32_t all = 0;
        for (int i = 0; i < LANES; i++) all += codes_sum[i];
        scales[b] = scale, sums[b] = scale * float(std::int32_t(all));
    }
    for (int b = num_blocks; b < to.padded_blocks; b++) scales[b] = sums[b] = 0.0f;
}

template <Dtype D, int N, int M> static void float_tile(const Matrix& w, const float* x, int n, int m, Outputs to) {
    F acc[N][M]{};
    const std::size_t depth = w.num_in;
    x += m * depth;
    for (std::size_t k = 0; k < depth; k += LANES) {
        F c[N];
        for (int i = 0; i < N; i++) c[i] = load_as(w.floats, (n + i) * depth + k, D);
        for (int j = 0; j < M; j++) {
            const F v = load<F>(x + j * depth + k);
            for (int i = 0; i < N; i++) acc[i][j] = fma(c[i], v, acc[i][j]);
        }
    }
    for (int i = 0; i < N; i++)
        for (int j = 0; j < M; j++) to.at(m + j, n + i) = sum(acc[i][j]) + (w.offset ? w.offset[n + i] : 0.0f);
}

using FloatTileFn = void (*)(const Matrix&, const float*, int, int, Outputs);
template <Dtype D, int N> static FloatTileFn float_tile_of(int rows) {
    switch (rows) {
        case 1: return float_tile<D, N, 1>;
        case 2: return float_tile<D, N, 2>;
        case 3: return float_tile<D, N, 3>;
        default: return float_tile<D, N, kTileRows>;
    }
}

static void float_product(const Matrix& w, const float* x, int num_rows, int first, int last, Outputs to) {
    for (int n = first; n < last;) {
        const int outputs = last - n >= kTileOut ? kTileOut : 1;
        for (int m = 0; m < num_rows; m += kTileRows) {
            const int rows = min1(kTileRows, num_rows - m);
            const bool half = w.dtype == Dtype::f16;
            FloatTileFn fn = outputs == 1 ? (half ? float_tile_of<Dtype::f16, 1>(rows) : float_tile_of<Dtype::bf16, 1>(rows))
                                          : (half ? float_tile_of<Dtype::f16, kTileOut>(rows) : float_tile_of<Dtype::bf16, kTileOut>(rows));
            fn(w, x, n, m, to);
        }
        n += outputs;
    }
}

static const LinearTable kLinear = {kPairs, round_row, product, float_product, product_scratch, table_row};
