// Linear layers of one instruction-set level; see linear_jobs.h.
//
// Tiles of a few outputs times a few rows, so that each code and each input that is loaded is used several times. Codes that no tile
// unpacks by itself are unpacked before, a few outputs' once for all rows of x.

#if LANES == 16
constexpr int kTileOut = 4, kTileRows = 4;
#elif LANES == 8
constexpr int kTileOut = 2, kTileRows = 4;
#else
constexpr int kTileOut = 4, kTileRows = 4;
#endif
constexpr bool kWidens = LANES == 8; // 16-bit floats before products of many rows; AVX-512 widens in passing as fast
constexpr int kWideOut = 3;           // outputs of a tile of widened floats: what registers hold
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

constexpr int kSpread = 32; // codes that are widened together: no group has fewer

template <int Bits> TQ_INLINE void spread_codes(const std::uint8_t* p, std::uint8_t* out) {
    if constexpr (Bits == 8) {
        std::memcpy(out, p, kSpread);
    } else if constexpr (Bits == 4) {
        for (int i = 0; i < kSpread / 2; i++) out[2 * i] = p[i] & 15, out[2 * i + 1] = p[i] >> 4;
    } else {
        for (int i = 0; i < kSpread; i += 8, p += Bits) { // eight codes are as many bytes as a code has bits
            std::uint64_t eight = 0;
            std::memcpy(&eight, p, Bits);
            for (int j = 0; j < 8; j++) out[i + j] = std::uint8_t(eight >> (j * Bits) & ((1 << Bits) - 1));
        }
    }
}

// Row n's inputs [from, to) as they stand.
template <int Bits, bool IsFp4> static void dense_row(const Matrix& w, int n, int from, int to, float* out) {
    const std::uint8_t* codes = w.codes + (std::size_t(n) * w.num_in + from) / 8 * Bits;
    const std::size_t groups = std::size_t(n) * w.num_groups();
    std::uint8_t bytes[kSpread];
    for (int k = from; k < to; k += kSpread, codes += kSpread / 8 * Bits, out += kSpread) {
        const std::size_t group = groups + k / w.group;
        spread_codes<Bits>(codes, bytes);
        if (IsFp4)
            for (std::uint8_t& code : bytes) code = kFp4[code];
        const float scale = IsFp4 ? exponent_to_float(static_cast<const std::uint8_t*>(w.scales)[group]) * 0.5f : float_at(w.scales, group, w.dtype);
        const float bias = IsFp4 ? scale * -kFp4Zero : float_at(w.biases, group, w.dtype); // exact either way for mxfp4
        for (int i = 0; i < kSpread; i += LANES) store_to(out + i, fma(to_float(__builtin_convertvector(load<B1>(bytes + i), I)), splat(scale), splat(bias)));
    }
}

static void dense_float_row(const Matrix& w, int n, int from, int to, float* out) {
    const std::size_t start = std::size_t(n) * w.num_in;
    for (int k = from; k < to; k += LANES) store_to(out + k - from, load_as(w.floats, start + k, w.dtype));
}

using DenseRowFn = void (*)(const Matrix&, int, int, int, float*);
static DenseRowFn dense_row_of(const Matrix& w) {
    if (w.is_mxfp4) return dense_row<4, true>;
    switch (w.bits) {
        case 0: return dense_float_row;
        case 2: return dense_row<2, false>;
        case 3: return dense_row<3, false>;
        case 4: return dense_row<4, false>;
        case 5: return dense_row<5, false>;
        case 6: return dense_row<6, false>;
        default: return dense_row<8, false>;
    }
}

static void dense(const Matrix& w, int first, int last, int from, int to, float* out) {
    const DenseRowFn row = dense_row_of(w);
    for (int n = first; n < last; n++, out += to - from) row(w, n, from, to, out);
}

static float mark_of(const float* x, int n) {
    F total{};
    for (int i = 0; i < n; i += LANES) {
        const F v = load<F>(x + i);
        total = total + (v - v);
    }
    return sum(total);
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
            to.nibbles ? store_nibble_inputs(codes, b * block + i, c) : store_inputs(codes, b * block + i, c);
        }
        std::uint32_t all = 0;
        for (int i = 0; i < LANES; i++) all += codes_sum[i];
        scales[b] = scale, sums[b] = scale * float(std::int32_t(all));
    }
    for (int b = num_blocks; b < to.padded_blocks; b++) scales[b] = sums[b] = 0.0f;
}

// weights: N rows of w's inputs as D, the first one of output n.
template <Dtype D, int N, int M> static void float_tile(const Matrix& w, const void* weights, const float* x, int n, int m, Outputs to) {
    F acc[N][M]{};
    const std::size_t depth = w.num_in;
    x += m * depth;
    for (std::size_t k = 0; k < depth; k += LANES) {
        F c[N];
        for (int i = 0; i < N; i++) c[i] = load_row<D>(weights, i * depth + k);
        for (int j = 0; j < M; j++) {
            const F v = load<F>(x + j * depth + k);
            for (int i = 0; i < N; i++) acc[i][j] = fma(c[i], v, acc[i][j]);
        }
    }
    for (int i = 0; i < N; i++)
        for (int j = 0; j < M; j++) to.at(m + j, n + i) = sum(acc[i][j]) + (w.offset ? w.offset[n + i] : 0.0f);
}

using FloatTileFn = void (*)(const Matrix&, const void*, const float*, int, int, Outputs);
template <Dtype D, int N> static FloatTileFn float_tile_of(int rows) {
    switch (rows) {
        case 1: return float_tile<D, N, 1>;
        case 2: return float_tile<D, N, 2>;
        case 3: return float_tile<D, N, 3>;
        default: return float_tile<D, N, kTileRows>;
    }
}
template <int N> static FloatTileFn float_tile_of(Dtype dtype, int rows) {
    if (dtype == Dtype::f32) return float_tile_of<Dtype::f32, N>(rows);
    return dtype == Dtype::f16 ? float_tile_of<Dtype::f16, N>(rows) : float_tile_of<Dtype::bf16, N>(rows);
}

static void float_product(const Matrix& w, const float* x, int num_rows, int first, int last, Outputs to, float* scratch) {
    const bool is_wide = kWidens && num_rows > kTileRows;
    const int most = is_wide ? kWideOut : kTileOut;
    for (int n = first; n < last;) {
        const int outputs = last - n >= most ? most : 1;
        const void* weights = static_cast<const std::uint16_t*>(w.floats) + std::size_t(n) * w.num_in;
        if (is_wide) {
            for (int i = 0; i < outputs; i++) dense_float_row(w, n + i, 0, w.num_in, scratch + std::size_t(i) * w.num_in);
            weights = scratch;
        }
        const Dtype dtype = is_wide ? Dtype::f32 : w.dtype;
        for (int m = 0; m < num_rows; m += kTileRows) {
            const int rows = min1(kTileRows, num_rows - m);
            (outputs == 1 ? float_tile_of<1>(dtype, rows) : is_wide ? float_tile_of<kWideOut>(dtype, rows) : float_tile_of<kTileOut>(dtype, rows))(w, weights, x, n, m, to);
        }
        n += outputs;
    }
}

static const LinearTable kLinear = {kNibbles, round_row, product, float_product, product_scratch, dense, mark_of};
