// Products of codes as bytes with inputs as two bytes each, which levels with a byte dot product have; see linear.h.
//
// 4-bit codes are unpacked where they are multiplied, two units at a time; of other bits, a tile's outputs are unpacked to bytes first.

// A tile's outputs: their codes, row_bytes apart; how far behind these lies what is read next, 0: nowhere. Their scales and biases, a
// float for every block (N, padded_blocks), or null: as they are stored.
struct TileCodes {
    const std::uint8_t* codes;
    std::size_t row_bytes, ahead;
    const float *scales, *biases;
};

constexpr std::size_t kAheadBytes = 4096;
constexpr bool kNibbles = true;

// An output's scales or biases of blocks [b, b + 16), zeros behind the last one.
TQ_INLINE F of_blocks(const Matrix& w, const void* from, int output, int b) {
    const std::size_t start = std::size_t(output) * w.num_groups();
    const int left = w.num_blocks() - b;
    if (w.group == 2 * kUnit) return twice_each(load_floats(from, start + b / 2, min1(8, (left + 1) / 2), w.dtype));
    return load_floats(from, start + b, min1(16, left), w.dtype);
}

// Of blocks [b, b + 16): w = scale * code + bias.
struct Affine { F scales, biases; };
TQ_INLINE Affine affine_of(const Matrix& w, int output, int b) {
    if (!w.is_mxfp4) return {of_blocks(w, w.scales, output, b), of_blocks(w, w.biases, output, b)};
    const F scales = load_exponents(w.scales, std::size_t(output) * w.num_groups() + b, min1(16, w.num_blocks() - b)) * 0.5f;
    return {scales, scales * -kFp4Zero};
}

// The same of outputs [n, n + count) and all blocks, for tiles of other rows as well.
static void widen(const Matrix& w, int n, int count, float* scales, float* biases) {
    const int padded = w.padded_blocks();
    for (int b = 0; b < padded; b += LANES)
        for (int i = 0; i < count; i++) {
            const Affine affine = affine_of(w, n + i, b);
            store_to(scales + i * padded + b, affine.scales), store_to(biases + i * padded + b, affine.biases);
        }
}

// Factors of codes' products, of blocks [from, from + count), and what the biases add.
template <int N, int M, int K>
TQ_INLINE void add_biases(const Matrix& w, const Inputs& x, int n, int m, TileCodes at, int from, int count, float (&factors)[N][M][K], F (&acc)[N][M]) {
    const std::size_t padded = x.padded_blocks;
    for (int b = 0; b < count; b += LANES) {
        F scales[M], sums[M];
        for (int j = 0; j < M; j++) scales[j] = load<F>(x.scales + (m + j) * padded + from + b), sums[j] = load<F>(x.sums + (m + j) * padded + from + b);
        for (int i = 0; i < N; i++) {
            const std::size_t at_block = i * padded + from + b;
            const Affine affine = at.scales == nullptr ? affine_of(w, n + i, from + b) : Affine{load<F>(at.scales + at_block), load<F>(at.biases + at_block)};
            for (int j = 0; j < M; j++) {
                store_to(factors[i][j] + b, affine.scales * scales[j]);
                acc[i][j] = fma(affine.biases, sums[j], acc[i][j]);
            }
        }
    }
}

// Sums of a tile's lanes, with what is added to every product, to outputs n + i of rows m + j.
template <int N, int M> TQ_INLINE void store_sums(const Matrix& w, const F (&acc)[N][M], int n, int m, Outputs to) {
    if constexpr (N == 4 && M > 1) {
        float sums[4 * M];
        sums_of(acc, sums);
        for (int j = 0; j < M; j++)
            for (int i = 0; i < 4; i++) (&to.at(m + j, n))[i] = sums[4 * j + i] + (w.offset ? w.offset[n + i] : 0.0f);
    } else {
        for (int i = 0; i < N; i++)
            for (int j = 0; j < M; j++) to.at(m + j, n + i) = sum(acc[i][j]) + (w.offset ? w.offset[n + i] : 0.0f);
    }
}

// A tile's codes stay in registers while its rows pass, and a row's inputs while its outputs do. Halves: a unit is two blocks, each with
// scales of its own.
template <bool Halves, int N, int M> static void tile(const Matrix& w, const Inputs& x, int n, int m, TileCodes at, Outputs to) {
    constexpr int kBlocks = Halves ? 2 : 1;
    const std::size_t depth = x.row_codes();
    const std::int16_t* inputs = x.codes + m * depth;
    F acc[N][M]{};
    alignas(64) float factors[N][M][kChunkUnits * kBlocks];
    const int num_units = w.num_in / kUnit;
    for (int first = 0; first < num_units; first += kChunkUnits) {
        const int count = min1(kChunkUnits, num_units - first);
        add_biases(w, x, n, m, at, first * kBlocks, count * kBlocks, factors, acc);
        for (int u = 0; u < count; u++) {
            Codes c[N];
            for (int i = 0; i < N; i++) {
                const std::uint8_t* codes = at.codes + i * at.row_bytes + std::size_t(first + u) * kUnit;
                prefetch(codes + at.ahead);
                c[i] = load_codes(codes);
            }
            for (int j = 0; j < M; j++) {
                const UnitInputs row = load_unit_inputs(inputs + j * depth + std::size_t(first + u) * kUnit);
                for (int i = 0; i < N; i++) {
                    const float* factor = factors[i][j] + u * kBlocks;
                    acc[i][j] = fma(to_float(dot_unit(c[i], row)), Halves ? splat_halves(factor) : splat(*factor), acc[i][j]);
                }
            }
        }
    }
    store_sums(w, acc, n, m, to);
}

// The same for 4-bit codes as they are stored, two units at a time (isa_avx512.h).
template <bool IsFp4, bool Halves, int N, int M> static void pair_tile(const Matrix& w, const Inputs& x, int n, int m, TileCodes at, Outputs to) {
    constexpr int kBlocks = Halves ? 2 : 1; // of a unit
    const std::size_t depth = x.row_codes();
    const std::int16_t* inputs = x.codes + m * depth;
    F acc[N][M]{};
    alignas(64) float factors[N][M][kChunkUnits * kBlocks];
    const int num_units = w.num_in / kUnit;
    for (int first = 0; first < num_units; first += kChunkUnits) {
        const int count = min1(kChunkUnits, num_units - first);
        add_biases(w, x, n, m, at, first * kBlocks, count * kBlocks, factors, acc);
        const auto add = [&](int u, auto codes_of) TQ_INLINED {
            PairCodes c[N];
            for (int i = 0; i < N; i++) {
                const std::uint8_t* codes = at.codes + i * at.row_bytes + std::size_t(first + u) * (kUnit / 2);
                prefetch(codes + at.ahead);
                c[i] = IsFp4 ? fp4_pair(codes_of(codes)) : codes_of(codes);
            }
            for (int j = 0; j < M; j++) {
                const PairInputs row = load_pair_inputs(inputs + j * depth + std::size_t(first + u) * kUnit);
                for (int i = 0; i < N; i++) {
                    const float* factor = factors[i][j] + u * kBlocks;
                    const F products = to_float(dot_pair(c[i], row));
                    acc[i][j] = fma(products, Halves ? splat_quarters(factor) : splat_halves(factor), acc[i][j]);
                }
            }
        };
        int u = 0;
        for (; u + 2 <= count; u += 2) add(u, packed_pair);
        if (u < count) add(u, packed_half); // a last unit without another: its partner's codes count as zeros
    }
    store_sums(w, acc, n, m, to);
}

using TileFn = void (*)(const Matrix&, const Inputs&, int, int, TileCodes, Outputs);
template <bool IsFp4, bool Halves, int N> static TileFn pair_tile_of(int rows) {
    switch (rows) {
        case 1: return pair_tile<IsFp4, Halves, N, 1>;
        case 2: return pair_tile<IsFp4, Halves, N, 2>;
        case 3: return pair_tile<IsFp4, Halves, N, 3>;
        default: return pair_tile<IsFp4, Halves, N, kTileRows>;
    }
}
template <int N> static TileFn pair_tile_of(const Matrix& w, int rows) {
    if (w.is_mxfp4) return pair_tile_of<true, true, N>(rows); // its groups are of 32
    return w.group < kUnit ? pair_tile_of<false, true, N>(rows) : pair_tile_of<false, false, N>(rows);
}

template <bool Halves, int N> static TileFn tile_of(int rows) {
    switch (rows) {
        case 1: return tile<Halves, N, 1>;
        case 2: return tile<Halves, N, 2>;
        case 3: return tile<Halves, N, 3>;
        default: return tile<Halves, N, kTileRows>;
    }
}
template <int N> static TileFn tile_of(const Matrix& w, int rows) {
    if (w.nibbles) return pair_tile_of<N>(w, rows);
    return w.group < kUnit ? tile_of<true, N>(rows) : tile_of<false, N>(rows);
}

template <int Bits> static void unpack_row(const std::uint8_t* p, int num_units, std::uint8_t* out) {
    const auto unpacking = Unpacking<Bits>::make();
    for (int u = 0; u < num_units; u++) store_codes(unpacking.unit(p + std::size_t(u) * 8 * Bits), out + std::size_t(u) * kUnit);
}
using UnpackFn = void (*)(const std::uint8_t*, int, std::uint8_t*);
static UnpackFn unpack_of(int bits) {
    switch (bits) {
        case 2: return unpack_row<2>;
        case 3: return unpack_row<3>;
        case 5: return unpack_row<5>;
        default: return unpack_row<6>;
    }
}

// In floats: scales and biases of a tile's outputs, then their codes where these are unpacked.
static std::size_t product_scratch(const Matrix& w) {
    if (w.bits == 0) return kWidens ? std::size_t(kWideOut) * w.num_in : 0;
    return std::size_t(kTileOut) * (2 * w.padded_blocks() + w.num_in / 4);
}

static void product(const Matrix& w, const Inputs& x, int first, int last, Outputs to, float* scratch) {
    const std::size_t row_bytes = std::size_t(w.num_in) / 8 * w.bits;
    float *scales = scratch, *biases = scales + kTileOut * w.padded_blocks();
    auto* bytes = reinterpret_cast<std::uint8_t*>(biases + kTileOut * w.padded_blocks());
    const bool is_direct = w.bits == 8 || w.nibbles, is_shared = x.num_rows > kTileRows;
    const std::size_t tile_bytes = kTileOut * row_bytes, ahead = (kAheadBytes + tile_bytes - 1) / tile_bytes * tile_bytes;
    for (int n = first; n < last;) {
        const int outputs = last - n >= kTileOut ? kTileOut : 1;
        const std::uint8_t* codes = w.codes + n * row_bytes;
        if (!is_direct)
            for (int i = 0; i < outputs; i++) unpack_of(w.bits)(codes + i * row_bytes, w.num_in / kUnit, bytes + std::size_t(i) * w.num_in);
        if (is_shared) widen(w, n, outputs, scales, biases);
        TileCodes at = is_direct ? TileCodes{codes, row_bytes, ahead, scales, biases} : TileCodes{bytes, std::size_t(w.num_in), 0, scales, biases};
        if (!is_shared) at.scales = at.biases = nullptr;
        for (int m = 0; m < x.num_rows; m += kTileRows) {
            const int rows = min1(kTileRows, x.num_rows - m);
            (outputs == kTileOut ? tile_of<kTileOut>(w, rows) : tile_of<1>(w, rows))(w, x, n, m, at, to);
        }
        n += outputs;
    }
}
