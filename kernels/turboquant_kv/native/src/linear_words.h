// Products of codes and inputs as 16-bit words, for levels whose byte products would saturate or are missing; see linear.h.

#if !defined(TQ_OWN_NIBBLES)
constexpr bool kNibbles = false;
TQ_INLINE void store_nibble_inputs(std::int16_t*, int, I) {}
TQ_INLINE void nibble_parts(const std::uint8_t*, Part*) {}
TQ_INLINE void byte_parts(const std::uint8_t*, Part*) {}
TQ_INLINE void prefetch(const std::uint8_t*) {}
TQ_INLINE F splat_halves(const float*) { return F{}; }
#endif
TQ_INLINE void store_inputs(std::int16_t* row, int at, I c) { store_to(row + at, __builtin_convertvector(c, H)); }

constexpr std::size_t kAheadBytes = 4096; // how far behind what is read lies what is asked of memory
constexpr int kLineBytes = 64;

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

constexpr int kRowOut = kNibbles ? 4 : kTileOut; // outputs of a tile of one row, whose codes are as they are stored

// Where a tile finds its codes: as words, in order or as nibbles lie, or as they are stored.
enum class From { words, nibble_words, nibbles, bytes };

// A tile's outputs: their codes, row_bytes apart, and their scales and biases, a float for every block (N, padded_blocks), where they
// are not to be taken as they are stored.
struct TileCodes {
    const std::uint8_t* codes;
    std::size_t row_bytes;
    const float *scales, *biases;
    int groups; // of an output
};

// An output's scales or biases of blocks [b, b + LANES) as they are stored, a block a group; zeros behind the last one.
TQ_INLINE F of_blocks(const Matrix& w, const void* from, int output, int b, int groups) {
    const std::size_t start = std::size_t(output) * groups + b;
    const int left = groups - b;
    if (left >= LANES) return load_as(from, start, w.dtype);
    if (start + LANES <= std::size_t(w.num_out) * groups) { // what follows is the next output's
        I lanes;
        for (int i = 0; i < LANES; i++) lanes[i] = i;
        return (F)((I)load_as(from, start, w.dtype) & (lanes < left));
    }
    F x{};
    for (int i = 0; i < left; i++) x[i] = float_at(from, start + i, w.dtype);
    return x;
}

// The same of dtype D where LANES more may be read, the next output's: `is_own` has all bits set in lanes of this one's.
template <Dtype D> TQ_INLINE F own_blocks(const void* from, std::size_t start, I is_own) { return (F)((I)load_as(from, start, D) & is_own); }

TQ_INLINE I own_lanes(int count) {
    static const std::int32_t all_then_none[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    return load<I>(all_then_none + 16 - min1(count, 16));
}

// factors[i][j][b - from] = scale of output n + i's block b times that of row j's, for blocks [from, to) as they are stored.
template <Dtype D, int N, int M, int K> TQ_INLINE void scale_factors(const Matrix& w, int n, int groups, int from, int to, const float* x_scales, std::size_t padded, float (&factors)[N][M][K]) {
    for (int b = from; b < to; b += LANES) {
        const I is_own = own_lanes(groups - b);
        for (int i = 0; i < N; i++) {
            const F scales = own_blocks<D>(w.scales, std::size_t(n + i) * groups + b, is_own);
            for (int j = 0; j < M; j++) store_to(factors[i][j] + b - from, scales * load<F>(x_scales + j * padded + b));
        }
    }
}

// acc[i][j] += bias of output n + i's block times the sum of row j's, over all blocks, as they are stored.
template <Dtype D, int N, int M> TQ_INLINE void add_biases(const Matrix& w, int n, int groups, const float* x_sums, std::size_t padded, F (&acc)[N][M]) {
    for (int b = 0; b < groups; b += LANES) {
        const I is_own = own_lanes(groups - b);
        for (int i = 0; i < N; i++) {
            const F biases = own_blocks<D>(w.biases, std::size_t(n + i) * groups + b, is_own);
            for (int j = 0; j < M; j++) acc[i][j] = fma(biases, load<F>(x_sums + j * padded + b), acc[i][j]);
        }
    }
}

// Calls `with` with the dtype as a constant.
template <class Fn> TQ_INLINE void with_dtype(Dtype dtype, Fn with) {
    if (dtype == Dtype::f16) return with(std::integral_constant<Dtype, Dtype::f16>{});
    if (dtype == Dtype::bf16) return with(std::integral_constant<Dtype, Dtype::bf16>{});
    with(std::integral_constant<Dtype, Dtype::f32>{});
}

template <From Where> TQ_INLINE void load_unit(const std::uint8_t* row, int unit, Part c[kParts]) {
    if constexpr (Where == From::nibbles) {
        nibble_parts(row + std::size_t(unit) * (kUnit / 2), c);
    } else if constexpr (Where == From::bytes) {
        byte_parts(row + std::size_t(unit) * kUnit, c);
    } else {
        for (int s = 0; s < kParts; s++) c[s] = load_part(reinterpret_cast<const std::int16_t*>(row) + std::size_t(unit) * kUnit, s);
    }
}

// Halves: a unit is two blocks, each with scales of its own. They are halves of its parts, or, of nibbles, of every register.
template <From Where, bool Halves, int N, int M> static void tile(const Matrix& w, const Inputs& x, int n, int m, TileCodes at, Outputs to) {
    constexpr bool kSplit = Halves && (Where == From::nibble_words || Where == From::nibbles), kIsStored = Where == From::nibbles || Where == From::bytes;
    constexpr int kBlocks = Halves ? 2 : 1, kDots = kSplit ? 1 : kBlocks, kDotParts = kParts / kDots;
    const std::size_t depth = x.row_codes(), padded = x.padded_blocks;
    const std::int16_t* inputs = x.codes + m * depth;
    const float *x_scales = x.scales + m * padded, *x_sums = x.sums + m * padded;
    F acc[N][M]{};
    float factors[N][M][kChunkUnits * kBlocks];
    const int num_units = w.num_in / kUnit;
    // Figures as they are stored, with as many behind them as a register reads.
    const bool is_inside = kIsStored && at.scales == nullptr && std::size_t(n + N) * at.groups + LANES <= std::size_t(w.num_out) * at.groups;
    for (int first = 0; first < num_units; first += kChunkUnits) {
        const int count = min1(kChunkUnits, num_units - first), from = first * kBlocks;
        if (is_inside)
            with_dtype(w.dtype, [&](auto d) TQ_INLINED { scale_factors<d.value>(w, n, at.groups, from, from + count * kBlocks, x_scales, padded, factors); });
        for (int i = 0; i < (is_inside ? 0 : N); i++)
            for (int b = 0; b < count * kBlocks; b += LANES) {
                const F scales = kIsStored && at.scales == nullptr ? of_blocks(w, w.scales, n + i, from + b, at.groups) : load<F>(at.scales + i * padded + from + b);
                for (int j = 0; j < M; j++) store_to(factors[i][j] + b, scales * load<F>(x_scales + j * padded + from + b));
            }
        for (int u = 0; u < count; u++) {
            if (kIsStored) { // a tile's outputs lie behind each other, and so does what is read next
                constexpr int kUnitBytes = N * kUnit * (Where == From::nibbles ? 1 : 2) / 2;
                for (int line = 0; line < kUnitBytes; line += kLineBytes) prefetch(at.codes + std::size_t(first + u) * kUnitBytes + line + kAheadBytes);
            }
            for (int i = 0; i < N; i++) {
                Part c[kParts];
                load_unit<Where>(at.codes + i * at.row_bytes, first + u, c);
                for (int b = 0; b < kDots; b++)
                    for (int j = 0; j < M; j++) {
                        Dot dot{};
                        for (int s = b * kDotParts; s < (b + 1) * kDotParts; s++) dot = dot_part(dot, c[s], load_part(inputs + j * depth + std::size_t(first + u) * kUnit, s));
                        const float* factor = factors[i][j] + u * kBlocks + b;
                        acc[i][j] = fma(to_float(dot_sum(dot)), kSplit ? splat_halves(factor) : splat(*factor), acc[i][j]);
                    }
            }
        }
    }
    if (is_inside) with_dtype(w.dtype, [&](auto d) TQ_INLINED { add_biases<d.value>(w, n, at.groups, x_sums, padded, acc); });
    for (int i = 0; i < N; i++) {
        for (int b = 0; b < (is_inside ? 0 : num_units * kBlocks); b += LANES) {
            const F biases = kIsStored && at.biases == nullptr ? of_blocks(w, w.biases, n + i, b, at.groups) : load<F>(at.biases + i * padded + b);
            for (int j = 0; j < M; j++) acc[i][j] = fma(biases, load<F>(x_sums + j * padded + b), acc[i][j]);
        }
        for (int j = 0; j < M; j++) to.at(m + j, n + i) = sum(acc[i][j]) + (w.offset ? w.offset[n + i] : 0.0f);
    }
}

using TileFn = void (*)(const Matrix&, const Inputs&, int, int, TileCodes, Outputs);
template <From Where, bool Halves, int N> static TileFn tile_of(int rows) {
    switch (rows) {
        case 1: return tile<Where, Halves, N, 1>;
        case 2: return tile<Where, Halves, N, 2>;
        case 3: return tile<Where, Halves, N, 3>;
        default: return tile<Where, Halves, N, kTileRows>;
    }
}
template <From Where> static TileFn tile_of(bool halves, int outputs, int rows) {
    if (rows == 1 && outputs == kRowOut) return halves ? tile<Where, true, kRowOut, 1> : tile<Where, false, kRowOut, 1>;
    if (outputs == 1) return halves ? tile_of<Where, true, 1>(rows) : tile_of<Where, false, 1>(rows);
    return halves ? tile_of<Where, true, kTileOut>(rows) : tile_of<Where, false, kTileOut>(rows);
}
static TileFn tile_of(From where, bool halves, int outputs, int rows) {
    if constexpr (kNibbles) { // a level without an order of its own unpacks everything
        if (where == From::nibbles) return tile_of<From::nibbles>(halves, outputs, rows);
        if (where == From::bytes) return tile_of<From::bytes>(halves, outputs, rows);
        if (where == From::nibble_words && halves) return tile_of<From::nibble_words>(halves, outputs, rows);
    }
    return tile_of<From::words>(halves, outputs, rows);
}

// Codes of 4 and 8 bits are unpacked where they are multiplied, others before.
static From from_of(const Matrix& w) {
    if (kNibbles && !w.is_mxfp4) {
        if (w.bits == 4) return From::nibbles;
        if (w.bits == 8) return From::bytes;
    }
    return w.nibbles ? From::nibble_words : From::words;
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
static std::size_t product_scratch(const Matrix& w) {
    if (w.bits == 0) return kWidens ? std::size_t(kWideOut) * w.num_in : 0;
    return std::size_t(kTileOut) * (w.num_in / 2 + 2 * w.padded_blocks());
}

static void product(const Matrix& w, const Inputs& x, int first, int last, Outputs to, float* scratch) {
    const std::size_t padded = w.padded_blocks(), row_bytes = std::size_t(w.num_in) / 8 * w.bits;
    float *scales = scratch, *biases = scales + kTileOut * padded;
    auto* words = reinterpret_cast<std::int16_t*>(biases + kTileOut * padded);
    const UnpackFn unpack = unpack_of(w.bits);
    const int groups = w.num_groups();
    const From where = from_of(w);
    const bool is_stored = where == From::nibbles || where == From::bytes, is_whole = is_stored && w.group == w.block(); // nothing is unpacked
    for (int n = first; n < last;) {
        const int outputs = is_whole && x.num_rows == 1 && last - n >= kRowOut ? kRowOut : last - n >= kTileOut ? kTileOut : 1;
        for (int i = 0; i < (is_whole ? 0 : outputs); i++) {
            if (!is_stored) unpack(w.codes + (n + i) * row_bytes, w.num_in / kUnit, words + std::size_t(i) * w.num_in);
            if (w.is_mxfp4) {
                for (int k = i * w.num_in; k < (i + 1) * w.num_in; k++) words[k] = kFp4[words[k]];
                widen_exponents(w, n + i, scales + i * padded, biases + i * padded);
                continue;
            }
            widen(w, w.scales, n + i, scales + i * padded);
            widen(w, w.biases, n + i, biases + i * padded);
        }
        const TileCodes unpacked{reinterpret_cast<const std::uint8_t*>(words), 2 * std::size_t(w.num_in), scales, biases, groups};
        const TileCodes at = is_stored ? TileCodes{w.codes + n * row_bytes, row_bytes, is_whole ? nullptr : scales, is_whole ? nullptr : biases, groups} : unpacked;
        for (int m = 0; m < x.num_rows; m += kTileRows)
            tile_of(where, w.group < kUnit, outputs, min1(kTileRows, x.num_rows - m))(w, x, n, m, at, to);
        n += outputs;
    }
}
