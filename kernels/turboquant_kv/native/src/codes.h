// Where codes lie: a group is 16 tokens x D codes, stored as D/4 vectors of 64 codes, four vectors to a quartet.
//
//   keys    vector n = dims 4n..4n+3        byte = token * 4 + dim % 4      a 32-bit lane holds four dims of one token
//   values  vector n = 4 * (dim / 16) + token / 4   byte = (dim % 16) * 4 + token % 4   a lane: four tokens of one dim
//
// so a byte dot product sums along the lane and no register is ever summed across. A quartet's 64 lanes of four
// vectors w0..w3 are packed as whole 32-bit words:
//
//   4 bits  [w0 | w1 << 4] [w2 | w3 << 4]                 2 x 64 bytes
//   2 bits  [w0 | w1 << 2 | w2 << 4 | w3 << 6]            64 bytes
//   3 bits  the 2-bit plane of all quartets, then the top bits: per byte a nibble (bit j: vector j), lanes 0-7 in
//           the low, lanes 8-15 in the high nibbles       64 + 32 bytes
//   8 bits  as they are                                   4 x 64 bytes
//
// The third bit is a byte plane rather than 64-bit masks because AVX2 and NEON have no mask registers.
//
// A trellis code's level hangs on the branch bits of three coordinates before its own, so there the quartet before holds
// them, in the same bits of the same bytes: dims are dealt to quartets (native_dim), and a quartet's bytes hold four branch
// bits in the low nibble and four own bits in the high one (bit j: vector j). The second own bit of 3 bits is a plane like that
// of the third bit, but with bit j ^ 1 for vector j. At 4 bits that plane has 64 bytes a quartet, low nibbles the second own
// bits and high nibbles the third ones, again with bit j ^ 1 for vector j. Before the first quartet comes the last one, every coordinate
// moved one place on: from bit to bit and byte to byte of a key's lane, from lane to lane of values.

TQ_INLINE std::size_t top_plane_at(int dim) { return std::size_t(4) * dim; } // behind dim / 16 quartets of 64 bytes
constexpr int top_bytes(int bits) { return bits == 3 ? 32 : 64; } // of a quartet in the second plane, 3 bits or a trellis's 4

#if !defined(TQ_OWN_TRELLIS)
// Levels by look-ups of 16 entries: one a nibble of bits spreads them to where two vectors' indices want them.
struct SpreadBits {
    alignas(64) std::uint8_t entry[2][4][64] = {}; // [vectors 0 and 1, 2 and 3][bit of the index]
    constexpr SpreadBits() {
        for (int half = 0; half < 2; half++)
            for (int bit = 0; bit < 4; bit++)
                for (int x = 0; x < 64; x++) {
                    const int two = x >> (2 * half) & 3, ordered = bit == 3 ? two >> 1 | (two & 1) << 1 : two;
                    entry[half][bit][x] = std::uint8_t((ordered & 1) << bit | (ordered >> 1) << (bit + 4));
                }
    }
};
static constexpr SpreadBits kSpreadBits;

struct TrellisLut {
    Lut level, upper, spread[2][4]; // upper: levels 16 to 31 of 4 bits
    static inline TrellisLut make(const IntTable& t) {
        TrellisLut lut;
        lut.level = Lut::make<4>(t.entry);
        lut.upper = Lut::make<4>(t.entry + 16);
        for (int half = 0; half < 2; half++)
            for (int bit = 0; bit < 4; bit++) lut.spread[half][bit] = Lut::make<4>(kSpreadBits.entry[half][bit]);
        return lut;
    }
};
template <int Bits> TQ_INLINE void look_up_trellis(const TrellisLut& t, B4 now, B4 before, B4 earlier, B4 top, B4 c[4]) {
    const B4 high = now ^ earlier, own = shift_right<4>(now);
    for (int half = 0; half < 2; half++) {
        B4 two = look_up<4>(t.spread[half][0], before) | look_up<4>(t.spread[half][1], high) | look_up<4>(t.spread[half][2], own);
        if constexpr (Bits >= 3) two |= look_up<4>(t.spread[half][3], top);
        const B4 second = shift_right<4>(two);
        if constexpr (Bits == 2) { // indices of three bits leave bits 3 and 7 clear
            c[2 * half] = look_up_below_128(t.level, two);
            c[2 * half + 1] = look_up_below_128(t.level, second);
        } else {
            c[2 * half] = look_up<4>(t.level, two);
            c[2 * half + 1] = look_up<4>(t.level, second);
        }
        if constexpr (Bits == 4) { // the third own bits, moved up to bit 7
            const B4 first = half ? top : shift_left<2>(top), other = half ? shift_left<1>(top) : shift_left<3>(top);
            c[2 * half] = choose_by_top_bit(first, look_up<4>(t.upper, two), c[2 * half]);
            c[2 * half + 1] = choose_by_top_bit(other, look_up<4>(t.upper, second), c[2 * half + 1]);
        }
    }
}
#endif

template <int Kind> struct Tables { Lut lut; };
template <> struct Tables<8> { Lut256 entry, low; };
template <> struct Tables<kTrellis + 2> { TrellisLut lut; };
template <> struct Tables<kTrellis + 3> { TrellisLut lut; };
template <> struct Tables<kTrellis + 4> { TrellisLut lut; };

template <int Kind> TQ_INLINE Tables<Kind> make_tables(const IntTable& t) {
    if constexpr (Kind == 8) return {Lut256::make(t.entry), Lut256::make(t.low)};
    else if constexpr (is_trellis(Kind)) return {TrellisLut::make(t)};
    else return {Lut::make<Kind>(t.entry)};
}

// The four vectors of table entries of quartet `i`, lanes sub * LANES and up. Bits 2, 3, 4.
template <int Bits>
TQ_INLINE void unpack_quartet(const std::uint8_t* group, std::size_t top_plane, int i, int sub, const Tables<Bits>& t, B4 c[4]) {
    const std::uint8_t* p = group + i * (Bits == 4 ? 128 : 64) + sub * 4 * LANES;
    const B4 v = load<B4>(p);
    if constexpr (Bits == 4) {
        const B4 u = load<B4>(p + 64);
        c[0] = look_up<4>(t.lut, v);
        c[1] = look_up<4>(t.lut, shift_right<4>(v));
        c[2] = look_up<4>(t.lut, u);
        c[3] = look_up<4>(t.lut, shift_right<4>(u));
    } else if constexpr (Bits == 2) {
        c[0] = look_up<2>(t.lut, v);
        c[1] = look_up<2>(t.lut, shift_right<2>(v));
        c[2] = look_up<2>(t.lut, shift_right<4>(v));
        c[3] = look_up<2>(t.lut, shift_right<6>(v));
    } else {
        const B4 top = load_nibbles(group + top_plane + i * 32, sub);
        c[0] = look_up<3>(t.lut, join_3bit(v, shift_left<2>(top)));
        c[1] = look_up<3>(t.lut, join_3bit(shift_right<2>(v), shift_left<1>(top)));
        c[2] = look_up<3>(t.lut, join_3bit(shift_right<4>(v), top));
        c[3] = look_up<3>(t.lut, join_3bit(shift_right<6>(v), shift_right<1>(top)));
    }
}

// The quartets before one: q1 is next to it, and only the exclusive or of those before that is needed.
struct Before { B4 q1, q2, earlier; }; // earlier: q2 ^ q3

TQ_INLINE Before before_keys(const std::uint8_t* group, int num_quartets, int sub) {
    B4 q[3];
    for (int k = 0; k < 3; k++) {
        const U x = load<U>(group + (num_quartets - 1 - k) * 64 + sub * 4 * LANES);
        q[k] = (B4)((x << 1 & 0x0E0E0E0Eu) | (x << 5 & 0x01010101u));
    }
    return {q[0], q[1], q[1] ^ q[2]};
}

// Where the three quartets before quartet i of values lie in every group.
struct ValuesBefore {
    int at[3];
    U keep[3]; // no lane is before the first
    ValuesBefore(int num_quartets, int i, int sub) {
        for (int k = 0; k < 3; k++) {
            const bool wraps = i - 1 - k < 0;
            at[k] = (wraps ? num_quartets + i - 1 - k : i - 1 - k) * 64 + sub * 4 * LANES - (wraps ? 4 : 0);
            keep[k] = U{} - 1;
            if (wraps && sub == 0) keep[k][0] = 0;
        }
    }
    inline __attribute__((always_inline)) Before of(const std::uint8_t* group) const {
        B4 q[3];
        for (int k = 0; k < 3; k++) q[k] = (B4)(load<U>(group + at[k]) & keep[k]);
        return {q[0], q[1], q[1] ^ q[2]};
    }
};

// As unpack_quartet; `before` moves on to the next quartet.
template <int Kind>
TQ_INLINE void unpack_trellis(const std::uint8_t* group, std::size_t top_plane, int i, int sub, const Tables<Kind>& t, Before& before, B4 c[4]) {
    const B4 now = load<B4>(group + i * 64 + sub * 4 * LANES);
    B4 top{};
    if constexpr (bits_of(Kind) == 3) top = load_nibbles(group + top_plane + i * 32, sub);
    if constexpr (bits_of(Kind) == 4) top = load<B4>(group + top_plane + i * 64 + sub * 4 * LANES);
    look_up_trellis<bits_of(Kind)>(t.lut, now, before.q1, before.earlier, top, c);
    before = {now, before.q1, before.q1 ^ before.q2};
}

// Into the second-level cache: the first has too few outstanding misses to cover memory (half the bandwidth, measured).
TQ_INLINE void prefetch_line(const std::uint8_t* p) { __builtin_prefetch(p, 0, 2); }
template <int Kind> TQ_INLINE void prefetch_quartet(const std::uint8_t* group, std::size_t top_plane, int i) {
    constexpr int Bits = bits_of(Kind);
    constexpr std::size_t bytes = Bits == 3 || is_trellis(Kind) ? 64 : 32 * Bits;
    for (std::size_t line = 0; line < bytes; line += 64) prefetch_line(group + i * bytes + line);
    if (Bits == 3 && i % 2 == 0) prefetch_line(group + top_plane + i * 32);
    if (Kind == kTrellis + 4) prefetch_line(group + top_plane + i * 64);
}

// The same quartet as codes, 16 lanes of one code per byte: word[j][lane]. Scalar: for re-tiling and float tiles.
TQ_INLINE void quartet_words(const std::uint8_t* group, int bits, int dim, int i, std::uint32_t word[4][16]) {
    std::uint32_t a[2][16];
    if (bits == 8) {
        std::memcpy(word, group + i * 256, 256);
    } else if (bits == 4) {
        std::memcpy(a, group + i * 128, 128);
        for (int j = 0; j < 4; j++)
            for (int lane = 0; lane < 16; lane++) word[j][lane] = (a[j / 2][lane] >> (4 * (j & 1))) & 0x0F0F0F0F;
    } else {
        std::memcpy(a[0], group + i * 64, 64);
        for (int j = 0; j < 4; j++)
            for (int lane = 0; lane < 16; lane++) word[j][lane] = (a[0][lane] >> (2 * j)) & 0x03030303;
        if (bits == 3) {
            std::memcpy(a[1], group + top_plane_at(dim) + i * 32, 32);
            for (int j = 0; j < 4; j++)
                for (int lane = 0; lane < 16; lane++)
                    word[j][lane] |= ((a[1][lane & 7] >> (j + (lane & 8) / 2)) & 0x01010101) << 2;
        }
    }
}

TQ_INLINE void put_quartet_words(std::uint8_t* group, int bits, int dim, int i, const std::uint32_t word[4][16]) {
    std::uint32_t a[2][16];
    if (bits == 8) {
        std::memcpy(group + i * 256, word, 256);
    } else if (bits == 4) {
        for (int j = 0; j < 2; j++)
            for (int lane = 0; lane < 16; lane++) a[j][lane] = word[2 * j][lane] | word[2 * j + 1][lane] << 4;
        std::memcpy(group + i * 128, a, 128);
    } else {
        for (int lane = 0; lane < 16; lane++) {
            a[0][lane] = 0;
            for (int j = 0; j < 4; j++) a[0][lane] |= (word[j][lane] & 0x03030303) << (2 * j);
        }
        std::memcpy(group + i * 64, a, 64);
        if (bits == 3) {
            for (int lane = 0; lane < 8; lane++) {
                a[1][lane] = 0;
                for (int j = 0; j < 4; j++)
                    a[1][lane] |= (word[j][lane] >> 2 & 0x01010101) << j | (word[j][lane + 8] >> 2 & 0x01010101) << (j + 4);
            }
            std::memcpy(group + top_plane_at(dim) + i * 32, a[1], 32);
        }
    }
}

// A trellis quartet's codes the same way, own bits << 1 | branch bit.
TQ_INLINE void trellis_words(const std::uint8_t* group, int bits, int dim, int i, std::uint32_t word[4][16]) {
    std::uint32_t a[16], top[16] = {};
    std::memcpy(a, group + i * 64, 64);
    if (bits > 2) std::memcpy(top, group + top_plane_at(dim) + i * top_bytes(bits), top_bytes(bits));
    for (int j = 0; j < 4; j++)
        for (int lane = 0; lane < 16; lane++) {
            word[j][lane] = (a[lane] >> j & 0x01010101) | (a[lane] >> (4 + j) & 0x01010101) << 1;
            if (bits == 3) word[j][lane] |= (top[lane & 7] >> ((j ^ 1) + (lane & 8) / 2) & 0x01010101) << 2;
            if (bits == 4) word[j][lane] |= (top[lane] >> (j ^ 1) & 0x01010101) << 2 | (top[lane] >> (4 + (j ^ 1)) & 0x01010101) << 3;
        }
}

TQ_INLINE void put_trellis_words(std::uint8_t* group, int bits, int dim, int i, const std::uint32_t word[4][16]) {
    std::uint32_t a[16] = {}, top[16] = {};
    for (int j = 0; j < 4; j++)
        for (int lane = 0; lane < 16; lane++) {
            a[lane] |= (word[j][lane] & 0x01010101) << j | (word[j][lane] >> 1 & 0x01010101) << (4 + j);
            if (bits == 3) top[lane & 7] |= (word[j][lane] >> 2 & 0x01010101) << ((j ^ 1) + (lane & 8) / 2);
            if (bits == 4) top[lane] |= (word[j][lane] >> 2 & 0x01010101) << (j ^ 1) | (word[j][lane] >> 3 & 0x01010101) << (4 + (j ^ 1));
        }
    std::memcpy(group + i * 64, a, 64);
    if (bits > 2) std::memcpy(group + top_plane_at(dim) + i * top_bytes(bits), top, top_bytes(bits));
}

// Quartet i's words of branch bits (low nibbles count), the quartets before the first included.
TQ_INLINE void branch_words(const Side& side, const std::uint8_t* group, int i, std::uint32_t word[16]) {
    if (i >= 0) {
        std::memcpy(word, group + i * 64, 64);
        return;
    }
    std::uint32_t last[16];
    std::memcpy(last, group + (side.dim / 16 + i) * 64, 64);
    for (int lane = 0; lane < 16; lane++) {
        if (side.is_key) word[lane] = (last[lane] << 1 & 0x0E0E0E0E) | (last[lane] << 5 & 0x01010101);
        else word[lane] = lane ? last[lane - 1] : 0;
    }
}

// Quartet i's indices into the book, 16 lanes of one per byte.
TQ_INLINE void index_words(const Side& side, const std::uint8_t* group, int i, std::uint32_t word[4][16]) {
    if (!side.is_trellis) {
        quartet_words(group, side.bits, side.dim, i, word);
        return;
    }
    std::uint32_t before[4][16]; // and the quartet itself
    for (int k = 0; k < 4; k++) branch_words(side, group, i - k, before[k]);
    trellis_words(group, side.bits, side.dim, i, word);
    for (int j = 0; j < 4; j++)
        for (int lane = 0; lane < 16; lane++) {
            const std::uint32_t high = before[0][lane] ^ before[2][lane] ^ before[3][lane];
            word[j][lane] = (word[j][lane] & 0x0E0E0E0E) << 1 | (high >> j & 0x01010101) << 1 | (before[1][lane] >> j & 0x01010101);
        }
}

// Which dim lies at place 16 * quartet + r: r is 4 * vector + byte of keys, the lane of values.
TQ_INLINE int native_dim(const Side& side, int place) {
    if (!side.is_trellis) return place;
    const int r = place % 16;
    return place / 16 + (side.is_key ? r % 4 * 4 + r / 4 : r) * (side.dim / 16);
}

static void to_native_order(const Side& side, float* x) {
    float y[kMaxDim];
    std::memcpy(y, x, sizeof(float) * side.dim);
    for (int place = 0; place < side.dim; place++) x[place] = y[native_dim(side, place)];
}

static void from_native_order(const Side& side, float* x) {
    float y[kMaxDim];
    std::memcpy(y, x, sizeof(float) * side.dim);
    for (int place = 0; place < side.dim; place++) x[native_dim(side, place)] = y[place];
}

// Token-major codes (16, dim), one per byte, to a group and back.
TQ_INLINE void pack_group(const Side& side, const std::uint8_t* codes, std::uint8_t* group) {
    const int dim = side.dim;
    std::uint8_t ordered[16 * kMaxDim];
    if (side.is_trellis) {
        for (int place = 0; place < dim; place++)
            for (int t = 0, d = native_dim(side, place); t < 16; t++) ordered[t * dim + place] = codes[t * dim + d];
        codes = ordered;
    }
    for (int i = 0; i < dim / 16; i++) {
        std::uint32_t word[4][16];
        for (int j = 0; j < 4; j++)
            for (int lane = 0; lane < 16; lane++) {
                if (side.is_key) std::memcpy(&word[j][lane], codes + lane * dim + (4 * i + j) * 4, 4);
                else {
                    const std::uint8_t* p = codes + (4 * j) * dim + i * 16 + lane;
                    word[j][lane] = p[0] | p[dim] << 8 | p[2 * dim] << 16 | std::uint32_t(p[3 * dim]) << 24;
                }
            }
        (side.is_trellis ? put_trellis_words : put_quartet_words)(group, side.bits, dim, i, word);
    }
}

TQ_INLINE void unpack_group(const Side& side, const std::uint8_t* group, std::uint8_t* codes) {
    const int dim = side.dim;
    std::uint8_t ordered[16 * kMaxDim], *out = side.is_trellis ? ordered : codes;
    for (int i = 0; i < dim / 16; i++) {
        std::uint32_t word[4][16];
        (side.is_trellis ? trellis_words : quartet_words)(group, side.bits, dim, i, word);
        for (int j = 0; j < 4; j++)
            for (int lane = 0; lane < 16; lane++) {
                if (side.is_key) std::memcpy(out + lane * dim + (4 * i + j) * 4, &word[j][lane], 4);
                else
                    for (int k = 0; k < 4; k++) out[(4 * j + k) * dim + i * 16 + lane] = std::uint8_t(word[j][lane] >> (8 * k));
            }
    }
    for (int place = 0; side.is_trellis && place < dim; place++)
        for (int t = 0, d = native_dim(side, place); t < 16; t++) codes[t * dim + d] = ordered[t * dim + place];
}

// Token-major trellis codes (16, dim) to levels, in place.
static void codes_to_levels(int dim, std::uint8_t* codes) {
    for (int t = 0; t < 16; t++, codes += dim) {
        int state = 0; // the last three branch bits, the newest in bit 0
        for (int d = 0; d < dim; d++) {
            const int branch = codes[d] & 1, high = branch ^ (state >> 1 & 1) ^ (state >> 2 & 1);
            codes[d] = std::uint8_t((codes[d] >> 1) << 2 | high << 1 | (state & 1));
            state = (state << 1 | branch) & 7;
        }
    }
}

// Canonical: a little-endian bit stream per token. Which bits of dim d's code lie where in it, lowest first: a scalar code in one
// piece; of a trellis code the branch bit in a plane that interleaves halves of 16 dims, two own bits in a plane in order, a
// single one in another interleaved plane.
struct Piece { int at, num_bits; };
struct Places { Piece piece[3]; int count; };
TQ_INLINE Places places_of(const Side& side, int d) {
    if (!side.is_trellis) return {{{d * side.bits, side.bits}}, 1};
    const int interleaved = d / 16 * 16 + d % 8 * 2 + d % 16 / 8;
    const Piece branch{interleaved, 1}, pair{side.dim + 2 * d, 2}, last{(side.bits - 1) * side.dim + interleaved, 1};
    if (side.bits == 2) return {{branch, last}, 2};
    return {{branch, pair, last}, side.bits - 1};
}

TQ_INLINE void put_bits(std::uint8_t* row, int at, int value) { // all bits of row there are 0
    value <<= at & 7;
    row[at / 8] |= std::uint8_t(value);
    if (value > 255) row[at / 8 + 1] |= std::uint8_t(value >> 8);
}
TQ_INLINE int get_bits(const std::uint8_t* row, int at, int count) {
    int value = row[at / 8];
    if ((at & 7) + count > 8) value |= row[at / 8 + 1] << 8;
    return (value >> (at & 7)) & ((1 << count) - 1);
}

static void to_canonical(const Store& store, const Side& side, const std::uint8_t* group, std::uint8_t* packed) {
    const std::size_t row_bytes = std::size_t(side.dim) * side.bits / 8;
    std::uint8_t codes[16 * kMaxDim];
    for (int g = 0; g < store.groups_per_page(); g++, group += side.group_bytes(), packed += 16 * row_bytes) {
        unpack_group(side, group, codes);
        std::memset(packed, 0, 16 * row_bytes);
        for (int t = 0; t < 16; t++)
            for (int d = 0; d < side.dim; d++) {
                const Places at = places_of(side, d);
                int code = codes[t * side.dim + d];
                for (int n = 0; n < at.count; n++) {
                    put_bits(packed + t * row_bytes, at.piece[n].at, code & ((1 << at.piece[n].num_bits) - 1));
                    code >>= at.piece[n].num_bits;
                }
            }
    }
}

static void from_canonical(const Store& store, const Side& side, const std::uint8_t* packed, std::uint8_t* group) {
    const std::size_t row_bytes = std::size_t(side.dim) * side.bits / 8;
    std::uint8_t codes[16 * kMaxDim];
    for (int g = 0; g < store.groups_per_page(); g++, group += side.group_bytes(), packed += 16 * row_bytes) {
        for (int t = 0; t < 16; t++)
            for (int d = 0; d < side.dim; d++) {
                const Places at = places_of(side, d);
                int code = 0, num_bits = 0;
                for (int n = 0; n < at.count; n++) {
                    code |= get_bits(packed + t * row_bytes, at.piece[n].at, at.piece[n].num_bits) << num_bits;
                    num_bits += at.piece[n].num_bits;
                }
                codes[t * side.dim + d] = std::uint8_t(code);
            }
        pack_group(side, codes, group);
    }
}
