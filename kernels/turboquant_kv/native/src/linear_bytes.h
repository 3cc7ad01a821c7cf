// Products of codes as bytes with inputs as two bytes each, which levels with a byte dot product have; see linear.h.
//
// A few rows unpack 4-bit codes where they multiply them; for more rows, and of other bits, a tile's outputs are unpacked to
// bytes first, which are 8-bit codes.

// Codes of a tile's outputs, row_bytes apart; how far behind them lies what is read next, 0: nowhere.
struct Packed {
    const std::uint8_t* codes;
    std::size_t row_bytes, ahead;
};

constexpr std::size_t kAheadBytes = 4096;

// An output's scales or biases of blocks [b, b + 16), zeros behind the last one.
TQ_INLINE F of_blocks(const Matrix& w, const void* from, int output, int b) {
    const std::size_t start = std::size_t(output) * w.num_groups();
    const int left = w.num_blocks() - b;
    if (w.group == 2 * kUnit) return twice_each(load_floats(from, start + b / 2, min1(8, (left + 1) / 2), w.dtype));
    return load_floats(from, start + b, min1(16, left), w.dtype);
}

// Halves: a unit is two blocks, each with scales of its own.
template <int Bits, bool Halves, int N, int M> static void tile(const Matrix& w, const Inputs& x, int n, int m, Packed at, Outputs to) {
    constexpr int kBlocks = Halves ? 2 : 1;
    const std::size_t depth = w.num_in, padded = x.padded_blocks;
    const std::int16_t* inputs = x.codes + m * depth;
    const float *x_scales = x.scales + m * padded, *x_sums = x.sums + m * padded;
    const auto unpacking = Unpacking<Bits>::make();
    F acc[N][M]{};
    float factors[N][M][kChunkUnits * kBlocks];
    const int num_units = w.num_in / kUnit;
    for (int first = 0; first < num_units; first += kChunkUnits) {
        const int count = min1(kChunkUnits, num_units - first), from = first * kBlocks;
        for (int i = 0; i < N; i++)
            for (int b = 0; b < count * kBlocks; b += LANES) {
                const F scales = of_blocks(w, w.scales, n + i, from + b), biases = of_blocks(w, w.biases, n + i, from + b);
                for (int j = 0; j < M; j++) {
                    store_to(factors[i][j] + b, scales * load<F>(x_scales + j * padded + from + b));
                    acc[i][j] = fma(biases, load<F>(x_sums + j * padded + from + b), acc[i][j]);
                }
            }
        for (int u = 0; u < count; u++)
            for (int i = 0; i < N; i++) {
                const std::uint8_t* codes = at.codes + i * at.row_bytes + std::size_t(first + u) * 8 * Bits;
                const Codes c = unpacking.unit(codes);
                if (Bits == 8 || u % 2 == 0) prefetch(codes + at.ahead);
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

using TileFn = void (*)(const Matrix&, const Inputs&, int, int, Packed, Outputs);
template <int Bits, bool Halves, int N> static TileFn tile_of(int rows) {
    switch (rows) {
        case 1: return tile<Bits, Halves, N, 1>;
        case 2: return tile<Bits, Halves, N, 2>;
        case 3: return tile<Bits, Halves, N, 3>;
        default: return tile<Bits, Halves, N, kTileRows>;
    }
}
template <int Bits> static TileFn tile_of(bool halves, int outputs, int rows) {
    if (outputs == 1) return halves ? tile_of<Bits, true, 1>(rows) : tile_of<Bits, false, 1>(rows);
    return halves ? tile_of<Bits, true, kTileOut>(rows) : tile_of<Bits, false, kTileOut>(rows);
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
        case 4: return unpack_row<4>;
        case 5: return unpack_row<5>;
        default: return unpack_row<6>;
    }
}

// In floats: codes of a tile's outputs.
static std::size_t product_scratch(const Matrix& w) { return std::size_t(kTileOut) * (w.num_in / 4); }

static void product(const Matrix& w, const Inputs& x, int first, int last, Outputs to, float* scratch) {
    const std::size_t row_bytes = std::size_t(w.num_in) / 8 * w.bits;
    auto* bytes = reinterpret_cast<std::uint8_t*>(scratch);
    const bool is_direct = w.bits == 8 || (w.bits == 4 && x.num_rows <= kTileRows), halves = w.group < kUnit;
    const std::size_t tile_bytes = kTileOut * row_bytes, ahead = (kAheadBytes + tile_bytes - 1) / tile_bytes * tile_bytes;
    for (int n = first; n < last;) {
        const int outputs = last - n >= kTileOut ? kTileOut : 1;
        const std::uint8_t* codes = w.codes + n * row_bytes;
        if (!is_direct)
            for (int i = 0; i < outputs; i++) unpack_of(w.bits)(codes + i * row_bytes, w.num_in / kUnit, bytes + std::size_t(i) * w.num_in);
        const Packed at = is_direct ? Packed{codes, row_bytes, ahead} : Packed{bytes, std::size_t(w.num_in), 0};
        for (int m = 0; m < x.num_rows; m += kTileRows) {
            const int rows = min1(kTileRows, x.num_rows - m);
            const bool is_packed = is_direct && w.bits == 4;
            (is_packed ? tile_of<4>(halves, outputs, rows) : tile_of<8>(halves, outputs, rows))(w, x, n, m, at, to);
        }
        n += outputs;
    }
}
