// Products of codes and inputs as 16-bit words, for levels whose byte products would saturate or are missing; see linear.h.

constexpr bool kPairs = false;
TQ_INLINE void store_pair_inputs(std::int16_t*, int, I) {}
TQ_INLINE void store_inputs(std::int16_t* row, int at, I c) { store_to(row + at, __builtin_convertvector(c, H)); }

// Codes of 64 neighbouring inputs as words.
template <int Bits> TQ_INLINE void unpack_unit(const std::uint8_t* p, std::int16_t* out) {
#if defined(TQ_OWN_SMALL_UNPACKING)
    if constexpr (Bits == 8) return unpack_8bit(p, out);
    if constexpr (Bits == 4) return unpack_4bit(p, out);
    if constexpr (Bits == 2) return unpack_2bit(p, out);
#endif
    for (int i = 0; i < 8; i++) { // eight codes are Bits bytes
        std::uint64_t word = 0;
        std::memcpy(&word, p + i * Bits, Bits);
        for (int j = 0; j < 8; j++) out[8 * i + j] = std::int16_t(word >> (j * Bits) & ((1 << Bits) - 1));
    }
}

template <int Bits> static void unpack_row(const std::uint8_t* p, int num_units, std::int16_t* out) {
    for (int u = 0; u < num_units; u++) unpack_unit<Bits>(p + std::size_t(u) * 8 * Bits, out + std::size_t(u) * kUnit);
}
using UnpackFn = void (*)(const std::uint8_t*, int, std::int16_t*);
static UnpackFn unpack_of(int bits) {
    switch (bits) {
        case 2: return unpack_row<2>;
        case 3: return unpack_row<3>;
        case 4: return unpack_row<4>;
        case 5: return unpack_row<5>;
        case 6: return unpack_row<6>;
        default: return unpack_row<8>;
    }
}

// A tile's outputs: their codes as words (N, num_in), and their scales and biases, a float for every block (N, padded_blocks).
struct Unpacked {
    const std::int16_t* words;
    const float *scales, *biases;
};

// Halves: a unit is two blocks, each with scales of its own.
template <bool Halves, int N, int M> static void tile(const Matrix& w, const Inputs& x, int n, int m, Unpacked at, Outputs to) {
    constexpr int kBlocks = Halves ? 2 : 1, kBlockParts = kParts / kBlocks;
    const std::size_t depth = w.num_in, padded = x.padded_blocks;
    const std::int16_t* inputs = x.codes + m * depth;
    const float *x_scales = x.scales + m * padded, *x_sums = x.sums + m * padded;
    F acc[N][M]{};
    float factors[N][M][kChunkUnits * kBlocks];
    const int num_units = w.num_in / kUnit;
    for (int first = 0; first < num_units; first += kChunkUnits) {
        const int count = min1(kChunkUnits, num_units - first), from = first * kBlocks;
        for (int i = 0; i < N; i++)
            for (int j = 0; j < M; j++)
                for (int b = 0; b < count * kBlocks; b += LANES)
                    store_to(factors[i][j] + b, load<F>(at.scales + i * padded + from + b) * load<F>(x_scales + j * padded + from + b));
        for (int u = 0; u < count; u++)
            for (int b = 0; b < kBlocks; b++)
                for (int i = 0; i < N; i++) {
                    Part c[kBlockParts];
                    for (int s = 0; s < kBlockParts; s++) c[s] = load_part(at.words + i * depth + (first + u) * kUnit, b * kBlockParts + s);
                    for (int j = 0; j < M; j++) {
                        Dot dot{};
                        for (int s = 0; s < kBlockParts; s++)
                            dot = dot_part(dot, c[s], load_part(inputs + j * depth + (first + u) * kUnit, b * kBlockParts + s));
                        acc[i][j] = fma(to_float(dot_sum(dot)), splat(factors[i][j][u * kBlocks + b]), acc[i][j]);
                    }
                }
    }
    for (int i = 0; i < N; i++)
        for (int j = 0; j < M; j++) {
            for (std::size_t b = 0; b < padded; b += LANES)
                acc[i][j] = fma(load<F>(at.biases + i * padded + b), load<F>(x_sums + j * padded + b), acc[i][j]);
            to.at(m + j, n + i) = sum(acc[i][j]) + (w.offset ? w.offset[n + i] : 0.0f);
        }
}

using TileFn = void (*)(const Matrix&, const Inputs&, int, int, Unpacked, Outputs);
template <bool Halves, int N> static TileFn tile_of(int rows) {
    switch (rows) {
        case 1: return tile<Halves, N, 1>;
        case 2: return tile<Halves, N, 2>;
        case 3: return tile<Halves, N, 3>;
        default: return tile<Halves, N, kTileRows>;
    }
}
static TileFn tile_of(bool halves, int outputs, int rows) {
    if (outputs == 1) return halves ? tile_of<true, 1>(rows) : tile_of<false, 1>(rows);
    return halves ? tile_of<true, kTileOut>(rows) : tile_of<false, kTileOut>(rows);
}

// One output's scales or biases as a float for every block, zeros behind them.
static void widen(const Matrix& w, const void* from, int output, float* to) {
    const int groups = w.num_groups(), repeat = w.group / w.block(), padded = w.padded_blocks();
    const std::size_t start = std::size_t(output) * groups, end = std::size_t(w.num_out) * groups;
    int b = 0;
    if (repeat == 1) // what is read beyond this output's is the next ones', and replaced below
        for (; b < groups && start + b + LANES <= end; b += LANES) store_to(to + b, load_as(from, start + b, w.dtype));
    for (b = min1(b, groups); b < groups * repeat; b++) to[b] = float_at(from, start + b / repeat, w.dtype);
    for (; b < padded; b++) to[b] = 0.0f;
}

// The same of exponents, w = scale * kFp4[code] + bias.
static void widen_exponents(const Matrix& w, int output, float* scales, float* biases) {
    const auto* exponents = static_cast<const std::uint8_t*>(w.scales) + std::size_t(output) * w.num_groups();
    for (int b = 0; b < w.padded_blocks(); b++) {
        scales[b] = b < w.num_blocks() ? exponent_to_float(exponents[b]) * 0.5f : 0.0f;
        biases[b] = scales[b] * -kFp4Zero;
    }
}

// In floats: words, scales and biases of a tile's outputs.
static std::size_t product_scratch(const Matrix& w) { return std::size_t(kTileOut) * (w.num_in / 2 + 2 * w.padded_blocks()); }

static void product(const Matrix& w, const Inputs& x, int first, int last, Outputs to, float* scratch) {
    const std::size_t padded = w.padded_blocks(), row_bytes = std::size_t(w.num_in) / 8 * w.bits;
    float *scales = scratch, *biases = scales + kTileOut * padded;
    auto* words = reinterpret_cast<std::int16_t*>(biases + kTileOut * padded);
    const UnpackFn unpack = unpack_of(w.bits);
    for (int n = first; n < last;) {
        const int outputs = last - n >= kTileOut ? kTileOut : 1;
        for (int i = 0; i < outputs; i++) {
            unpack(w.codes + (n + i) * row_bytes, w.num_in / kUnit, words + std::size_t(i) * w.num_in);
            if (w.is_mxfp4) {
                for (int k = i * w.num_in; k < (i + 1) * w.num_in; k++) words[k] = kFp4[words[k]];
                widen_exponents(w, n + i, scales + i * padded, biases + i * padded);
                continue;
            }
            widen(w, w.scales, n + i, scales + i * padded);
            widen(w, w.biases, n + i, biases + i * padded);
        }
        for (int m = 0; m < x.num_rows; m += kTileRows)
            tile_of(w.group < kUnit, outputs, min1(kTileRows, x.num_rows - m))(w, x, n, m, {words, scales, biases}, to);
        n += outputs;
    }
}
