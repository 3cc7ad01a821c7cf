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

TQ_INLINE std::size_t top_plane_at(int dim) { return std::size_t(4) * dim; } // 3 bits: dim / 16 quartets of 64 bytes

template <int Bits> struct Tables { Lut lut; };
template <> struct Tables<8> { Lut256 entry, low; };

template <int Bits> TQ_INLINE Tables<Bits> make_tables(const IntTable& t) {
    if constexpr (Bits == 8) return {Lut256::make(t.entry), Lut256::make(t.low)};
    else return {Lut::make<Bits>(t.entry)};
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

// Into the second-level cache: the first has too few outstanding misses to cover memory (half the bandwidth, measured).
TQ_INLINE void prefetch_line(const std::uint8_t* p) { __builtin_prefetch(p, 0, 2); }
template <int Bits> TQ_INLINE void prefetch_quartet(const std::uint8_t* group, std::size_t top_plane, int i) {
    constexpr std::size_t bytes = Bits == 3 ? 64 : 32 * Bits;
    for (std::size_t line = 0; line < bytes; line += 64) prefetch_line(group + i * bytes + line);
    if (Bits == 3 && i % 2 == 0) prefetch_line(group + top_plane + i * 32);
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

// Token-major codes (16, dim), one per byte, to a group and back.
TQ_INLINE void pack_group(const Side& side, const std::uint8_t* codes, std::uint8_t* group) {
    const int dim = side.dim;
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
        put_quartet_words(group, side.bits, dim, i, word);
    }
}

TQ_INLINE void unpack_group(const Side& side, const std::uint8_t* group, std::uint8_t* codes) {
    const int dim = side.dim;
    for (int i = 0; i < dim / 16; i++) {
        std::uint32_t word[4][16];
        quartet_words(group, side.bits, dim, i, word);
        for (int j = 0; j < 4; j++)
            for (int lane = 0; lane < 16; lane++) {
                if (side.is_key) std::memcpy(codes + lane * dim + (4 * i + j) * 4, &word[j][lane], 4);
                else
                    for (int k = 0; k < 4; k++) codes[(4 * j + k) * dim + i * 16 + lane] = std::uint8_t(word[j][lane] >> (8 * k));
            }
    }
}

// Canonical: a little-endian bit stream per token.
static void to_canonical(const Store& store, const Side& side, const std::uint8_t* group, std::uint8_t* packed) {
    const std::size_t row_bytes = std::size_t(side.dim) * side.bits / 8;
    std::uint8_t codes[16 * kMaxDim];
    for (int g = 0; g < store.groups_per_page(); g++, group += side.group_bytes(), packed += 16 * row_bytes) {
        unpack_group(side, group, codes);
        std::memset(packed, 0, 16 * row_bytes);
        for (int t = 0; t < 16; t++)
            for (int d = 0; d < side.dim; d++) {
                const int bit = d * side.bits, value = codes[t * side.dim + d] << (bit & 7);
                packed[t * row_bytes + bit / 8] |= std::uint8_t(value);
                if (value > 255) packed[t * row_bytes + bit / 8 + 1] |= std::uint8_t(value >> 8);
            }
    }
}

static void from_canonical(const Store& store, const Side& side, const std::uint8_t* packed, std::uint8_t* group) {
    const std::size_t row_bytes = std::size_t(side.dim) * side.bits / 8;
    std::uint8_t codes[16 * kMaxDim];
    for (int g = 0; g < store.groups_per_page(); g++, group += side.group_bytes(), packed += 16 * row_bytes) {
        for (int t = 0; t < 16; t++)
            for (int d = 0; d < side.dim; d++) {
                const int bit = d * side.bits;
                int value = packed[t * row_bytes + bit / 8];
                if ((bit & 7) + side.bits > 8) value |= packed[t * row_bytes + bit / 8 + 1] << 8;
                codes[t * side.dim + d] = std::uint8_t((value >> (bit & 7)) & ((1 << side.bits) - 1));
            }
        pack_group(side, codes, group);
    }
}
