// Products of codes as bytes with inputs as two bytes each, which levels with a byte dot product have; see linear.h.
//
// A few rows unpack 4-bit codes where they multiply them, two units at a time; for more rows, and of other bits, a tile's
// outputs are unpacked to bytes first.

// Codes of a tile's outputs, row_bytes apart; how far behind them lies what is read next, 0: nowhere.
struct Packed {
    const std::uint8_t* codes;
    std::size_t row_bytes, ahead;
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

// Halves: a unit is two blocks, each with scales of its own.
template <bool Halves, int N, int M> static void tile(const Matrix& w, const Inputs& x, int n, int m, Packed at, Outputs to) {
    constexpr int kBlocks = Halves ? 2 : 1;
    const std::size_t depth = x.row_codes(), padded = x.padded_blocks;
    const std::int16_t* inputs = x.codes + m * depth;
    const float *x_scales = x.scales + m * padded, *x_sums = x.sums + m * padded;
    F acc[N][M]{};
    float factors[N][M][kChunkUnits * kBlocks];
    const int num_units = w.num_in / kUnit;
    for (int first = 0; first < num_units; first += kChunkUnits) {
        const int count = min1(kChunkUnits, num_units - first), from = first * kBlocks;
        for (int i = 0; i < N; i++)
            for (int b = 0; b < count * kBlocks; b += LANES) {
                const auto [scales, biases] = affine_of(w, n + i, from + b);
                for (int j = 0; j < M; j++) {
                    store_to(factors[i][j] + b, scales * load<F>(x_scales + j * padded + from + b));
                    acc[i][j] = fma(biases, load<F>(x_sums + j * padded + from + b), acc[i][j]);
                }
            }
        for (int u = 0; u < count; u++)
            for (int i = 0; i < N; i++) {
                const std::uint8_t* codes = at.codes + i * at.row_bytes + std::size_t(first + u) * kUnit;
                const Codes c = load_codes(codes);
                prefetch(codes + at.ahead);
                for (int j = 0; j < M; j++) {
                    const float* factor = factors[i][j] + u * kBlocks;
                    const F products = to_float(dot_unit(c, inputs + j * depth + std::size_t(first + u) * kUnit));
                    acc[i][j] = fma(products, Halves ? splat_halves(factor) : splat(*factor), acc[i][j]);
                }
            }
    }
    for (int i = 0; i < N; i++)
        for (int j = 0; j < M; j++) to.at(m + j, n + i) = sum(acc[i][j]) + (w.offset ? w.offset[n + i] : 0.0f);
}

// The same for 4-bit codes, two units at a time (isa_avx512.h). IsPacked: as they are stored, else unpacked before.
template <bool IsPacked, bool Halves, int N, int M> static void pair_tile(const Matrix& w, const Inputs& x, int n, int m, Packed at, Outputs to) {
    constexpr int kBlocks = Halves ? 2 : 1; // of a unit
    const std::size_t depth = x.row_codes(), padded = x.padded_blocks;
    const std::int16_t* inputs = x.codes + m * depth;
    const float *x_scales = x.scales + m * padded, *x_sums = x.sums + m * padded;
    F acc[N][M]{};
    float factors[N][M][kChunkUnits * kBlocks];
    const int num_units = w.num_in / kUnit;
    for (int first = 0; first < num_units; first += kChunkUnits) {
        const int count = min1(kChunkUnits, num_units - first), from = first * kBlocks;
        for (int i = 0; i < N; i++)
            for (int b = 0; b < count * kBlocks; b += LANES) {
                const auto [scales, biases] = affine_of(w, n + i, from + b);
                for (int j = 0; j < M; j++) {
                    store_to(factors[i][j] + b, scales * load<F>(x_scales + j * padded + from + b));
                    acc[i][j] = fma(biases, load<F>(x_sums + j * padded + from + b), acc[i][j]);
                }
            }
        const auto add = [&](int i, int u, PairCodes c) {
            for (int j = 0; j < M; j++) {
                const float* factor = factors[i][j] + u * kBlocks;
                const F products = to_float(dot_pair(c, inputs + j * depth + std::size_t(first + u) * kUnit));
                acc[i][j] = fma(products, Halves ? splat_quarters(factor) : splat_halves(factor), acc[i][j]);
            }
        };
        int u = 0;
        for (; u + 2 <= count; u += 2)
            for (int i = 0; i < N; i++) {
                const std::uint8_t* codes = at.codes + i * at.row_bytes + std::size_t(first + u) * (IsPacked ? 32 : 64);
                if (IsPacked) prefetch(codes + at.ahead);
                add(i, u, IsPacked ? packed_pair(codes) : stored_pair(codes));
            }
        if (u < count) // a last unit without another: its partner's codes count as zeros
            for (int i = 0; i < N; i++) {
                const std::uint8_t* codes = at.codes + i * at.row_bytes + std::size_t(first + u) * (IsPacked ? 32 : 64);
                add(i, u, IsPacked ? packed_half(codes) : stored_pair(codes));
            }
    }
    for (int i = 0; i < N; i++)
        for (int j = 0; j < M; j++) to.at(m + j, n + i) = sum(acc[i][j]) + (w.offset ? w.offset[n + i] : 0.0f);
}

using TileFn = void (*)(const Matrix&, const Inputs&, int, int, Packed, Outputs);
template <bool IsPacked, bool Halves, int N> static TileFn pair_tile_of(int rows) {
    switch (rows) {
        case 1: return pair_tile<IsPacked, Halves, N, 1>;
        case 2: return pair_tile<IsPacked, Halves, N, 2>;
        case 3: return pair_tile<IsPacked, Halves, N, 3>;
        default: return pair_tile<IsPacked, Halves, N, kTileRows>;
    }
}
template <bool IsPacked> static TileFn pair_tile_of(bool halves, int outputs, int rows) {
    if (outputs == 1) return halves ? pair_tile_of<IsPacked, true, 1>(rows) : pair_tile_of<IsPacked, false, 1>(rows);
    return halves ? pair_tile_of<IsPacked, true, kTileOut>(rows) : pair_tile_of<IsPacked, false, kTileOut>(rows);
}

template <bool IsFp4> static void unpack_pairs(const std::uint8_t* p, int num_units, std::uint8_t* out) {
    int u = 0;
    for (; u + 2 <= num_units; u += 2) store_pair(IsFp4 ? fp4_pair(packed_pair(p + std::size_t(u) * 32)) : packed_pair(p + std::size_t(u) * 32), out + std::size_t(u) * kUnit);
    if (u < num_units) store_pair(IsFp4 ? fp4_pair(packed_half(p + std::size_t(u) * 32)) : packed_half(p + std::size_t(u) * 32), out + std::size_t(u) * kUnit);
}

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

template <int Bits> static void unpack_row(const std::uint8_t* p, int num_units, std::uint8_t* out) {
    const auto unpacking = Unpacking<Bits>::make();
    for (int u = 0; u < num_units; u++) store_codes(unpacking.unit(p + std::size_t(u) * 8 * Bits), out + std::size_t(u) * kUnit);
}
using UnpackFn = void (*)(const std::uint8_t*, int, std::uint8_t*);
static UnpackFn unpack_of(const Matrix& w) {
    if (w.is_mxfp4) return unpack_pairs<true>;
    switch (w.bits) {
        case 2: return unpack_row<2>;
        case 3: return unpack_row<3>;
        case 4: return unpack_pairs<false>;
        case 5: return unpack_row<5>;
        default: return unpack_row<6>;
    }
}

// In floats: codes of a tile's outputs.
static std::size_t product_scratch(const Matrix& w) { return std::size_t(kTileOut) * (w.num_in + kUnit) / 4; }

static void product(const Matrix& w, const Inputs& x, int first, int last, Outputs to, float* scratch) {
    const std::size_t row_bytes = std::size_t(w.num_in) / 8 * w.bits;
    auto* bytes = reinterpret_cast<std::uint8_t*>(scratch);
    const bool is_direct = w.bits == 8 || (w.nibbles && !w.is_mxfp4 && x.num_rows <= kTileRows), halves = w.group < kUnit;
    const std::size_t tile_bytes = kTileOut * row_bytes, ahead = (kAheadBytes + tile_bytes - 1) / tile_bytes * tile_bytes;
    for (int n = first; n < last;) {
        const int outputs = last - n >= kTileOut ? kTileOut : 1;
        const std::uint8_t* codes = w.codes + n * row_bytes;
        if (!is_direct)
            for (int i = 0; i < outputs; i++) unpack_of(w)(codes + i * row_bytes, w.num_in / kUnit, bytes + i * x.row_codes());
        const Packed at = is_direct ? Packed{codes, row_bytes, ahead} : Packed{bytes, x.row_codes(), 0};
        for (int m = 0; m < x.num_rows; m += kTileRows) {
            const int rows = min1(kTileRows, x.num_rows - m);
            const TileFn fn = !w.nibbles ? tile_of(halves, outputs, rows) : is_direct ? pair_tile_of<true>(halves, outputs, rows) : pair_tile_of<false>(halves, outputs, rows);
            fn(w, x, n, m, at, to);
        }
        n += outputs;
    }
}
