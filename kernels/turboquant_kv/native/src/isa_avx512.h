// AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later): 16 lanes, one byte permute per 64 codes.
#define LANES 16
#define TQ_OWN_ROUNDING
#define TQ_OWN_TRELLIS
#include "isa_common.h"

// As the common one, in fewer instructions.
TQ_INLINE F exp2_negative(F x) {
    x = (F)_mm512_max_ps((__m512)x, _mm512_set1_ps(-126.0f));
    const __m512 whole = _mm512_roundscale_ps((__m512)x, 0);
    return (F)_mm512_scalef_ps((__m512)exp2_fraction(x - (F)whole), whole);
}
// Rounded to bytes; x in [0, 255].
TQ_INLINE B1 to_bytes(F x) { return (B1)_mm512_cvtusepi32_epi8(_mm512_cvtps_epi32((__m512)x)); }

constexpr const char* kName = "avx512-vnni";
constexpr int kKeyLow = 0, kKeyHigh = 255, kValueLow = -127, kValueHigh = 127;
constexpr bool kSplit = false;
constexpr int kQueryLimit = 127, kWeightLimit = 255;

// Indices may carry dirt above their 2, 3 or 4 bits: the table repeats over all 64 places.
struct Lut {
    __m512i table;
    template <int Bits> static inline Lut make(const std::uint8_t* entry) {
        return {_mm512_loadu_si512(entry)};
    }
};
template <int Bits> TQ_INLINE B4 look_up(const Lut& lut, B4 index) {
    return (B4)_mm512_permutexvar_epi8((__m512i)index, lut.table);
}
template <int N> TQ_INLINE B4 shift_right(B4 x) { return (B4)_mm512_srli_epi16((__m512i)x, N); }
template <int N> TQ_INLINE B4 shift_left(B4 x) { return (B4)_mm512_slli_epi16((__m512i)x, N); }
// Bits 0-1 of `low`, the others of `high`.
TQ_INLINE B4 join_3bit(B4 low, B4 high) {
    return (B4)_mm512_ternarylogic_epi32(_mm512_set1_epi8(3), (__m512i)low, (__m512i)high, 0xCA);
}
// 32 bytes whose low nibbles belong to lanes 0-7 and high nibbles to lanes 8-15.
TQ_INLINE B4 load_nibbles(const std::uint8_t* p, int) {
    __m256i x = _mm256_loadu_si256((const __m256i*)p);
    return (B4)_mm512_inserti64x4(_mm512_castsi256_si512(x), _mm256_srli_epi16(x, 4), 1);
}
struct Lut256 {
    __m512i t[4];
    static inline Lut256 make(const std::uint8_t* entry) {
        return {{_mm512_loadu_si512(entry), _mm512_loadu_si512(entry + 64), _mm512_loadu_si512(entry + 128), _mm512_loadu_si512(entry + 192)}};
    }
};
TQ_INLINE B4 look_up_256(const Lut256& lut, B4 index) {
    __m512i i = (__m512i)index;
    __m512i low = _mm512_permutex2var_epi8(lut.t[0], i, lut.t[1]), high = _mm512_permutex2var_epi8(lut.t[2], i, lut.t[3]);
    return (B4)_mm512_mask_blend_epi8(_mm512_movepi8_mask(i), low, high);
}
// The six bits that a permute takes as an index hold all of two trellis codes of 2 bits: h0 h1 l0 l1 o0 o1 of vectors 0 and 1,
// then of 2 and 3 (h, l: the subset; o: the own bit). At 3 bits the second own bits take the other vector's places, and at
// 4 bits the third ones do as well.
struct TrellisLut {
    __m512i window[4];
    static inline TrellisLut make(const IntTable& t) {
        return {{_mm512_load_si512(t.window[0]), _mm512_load_si512(t.window[1]), _mm512_load_si512(t.window[2]), _mm512_load_si512(t.window[3])}};
    }
};
TQ_INLINE __m512i pick(int mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi32(_mm512_set1_epi8(char(mask)), a, b, 0xCA); }
template <int Bits> TQ_INLINE void look_up_trellis(const TrellisLut& t, B4 now, B4 before, B4 earlier, B4 top, B4 c[4]) {
    const __m512i l = (__m512i)before, p = (__m512i)top;
    const __m512i oh = _mm512_ternarylogic_epi32((__m512i)now, (__m512i)earlier, _mm512_set1_epi8(15), 0x78); // now ^ (earlier & 15)
    [[maybe_unused]] const __m512i later = Bits == 4 ? _mm512_srli_epi16(p, 2) : p; // vectors 2 and 3 to the places of 0 and 1
    const __m512i two[2] = {pick(12, _mm512_slli_epi16(l, 2), oh), pick(12, l, _mm512_srli_epi16(oh, 2))};
    for (int j = 0; j < 4; j++) {
        const __m512i own = two[j / 2], others = j / 2 ? later : p;
        const __m512i index = Bits == 2 ? own : j % 2 ? pick(0x55, others, own) : pick(0x55, own, others);
        c[j] = (B4)_mm512_permutexvar_epi8(index, t.window[Bits == 4 ? j % 2 : j]); // fewer tables, more registers for sums
    }
}
// acc + sum of four unsigned times signed bytes per lane.
TQ_INLINE I dot_us(I acc, B4 a, B4 b) { return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b); }
// Linear layers: a unit's codes are one register of bytes. Inputs of 16 bits are multiplied as two signed bytes: of a unit
// first come the high ones, 64 bytes, then the low ones.
#define TQ_BYTE_PRODUCTS
using Codes = __m512i;
template <int Bits> struct Unpacking { // each eight codes are Bits bytes: a lane of 64 bits, from which a byte takes its own
    __m512i places, skipped, mask;
    static inline Unpacking make() {
        alignas(64) static constexpr auto table = [] { // bytes to fetch, then bits to skip
            std::array<std::uint8_t, 128> t{};
            for (int i = 0; i < 64; i++) t[i] = std::uint8_t(i / 8 * Bits + i % 8), t[64 + i] = std::uint8_t(i % 8 * Bits);
            return t;
        }();
        return {_mm512_load_si512(table.data()), _mm512_load_si512(table.data() + 64), _mm512_set1_epi8(char((1 << Bits) - 1))};
    }
    inline Codes unit(const std::uint8_t* p) const {
        const __m512i raw = _mm512_maskz_loadu_epi8((std::uint64_t(1) << (8 * Bits % 64)) - 1, p);
        return _mm512_and_si512(_mm512_multishift_epi64_epi8(skipped, _mm512_permutexvar_epi8(places, raw)), mask);
    }
};
TQ_INLINE Codes load_codes(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
TQ_INLINE void store_codes(Codes c, std::uint8_t* p) { _mm512_storeu_si512(p, c); }
struct UnitInputs { __m512i high, low; };
TQ_INLINE UnitInputs load_unit_inputs(const std::int16_t* p) { return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 32)}; }
TQ_INLINE I dot_unit(Codes c, UnitInputs x) {
    const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), c, x.high);
    return (I)_mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), c, x.low);
}
// Two units of 4-bit codes: a register of the even ones and one of the odd ones, the first unit in the lower lanes of both.
// Two masks and a shift unpack 128 codes, and both units' sums are widened and scaled together. Of a pair's inputs first come
// the high bytes of the even ones, then their low bytes, then those of the odd ones.
struct PairCodes { __m512i even, odd; };
TQ_INLINE PairCodes unpacked_pair(__m512i raw) {
    const __m512i low = _mm512_set1_epi8(15);
    return {_mm512_and_si512(raw, low), _mm512_and_si512(_mm512_srli_epi16(raw, 4), low)};
}
TQ_INLINE PairCodes packed_pair(const std::uint8_t* p) { return unpacked_pair(_mm512_loadu_si512(p)); }
TQ_INLINE PairCodes packed_half(const std::uint8_t* p) { return unpacked_pair(_mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)p))); }
TQ_INLINE PairCodes fp4_pair(PairCodes c) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)kFp4));
    return {_mm512_shuffle_epi8(table, c.even), _mm512_shuffle_epi8(table, c.odd)};
}
struct PairInputs { __m512i even_high, even_low, odd_high, odd_low; };
TQ_INLINE PairInputs load_pair_inputs(const std::int16_t* p) {
    return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 32), _mm512_loadu_si512(p + 64), _mm512_loadu_si512(p + 96)};
}
TQ_INLINE I dot_pair(PairCodes c, PairInputs x) {
    const __m512i high = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), c.even, x.even_high), c.odd, x.odd_high);
    return (I)_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), c.even, x.even_low), c.odd, x.odd_low);
}
TQ_INLINE void store_nibble_inputs(std::int16_t* row, int at, I c) {
    auto* p = reinterpret_cast<std::uint8_t*>(row + at / 128 * 128) + at % 128 / 64 * 32 + at % 64 / 2;
    const __m128i split = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m128i high = _mm_shuffle_epi8(_mm512_cvtepi32_epi8((__m512i)((c + 128) >> 8)), split);
    const __m128i low = _mm_shuffle_epi8(_mm512_cvtepi32_epi8((__m512i)c), split);
    _mm_storel_epi64((__m128i*)p, high);
    _mm_storel_epi64((__m128i*)(p + 64), low);
    _mm_storel_epi64((__m128i*)(p + 128), _mm_unpackhi_epi64(high, high));
    _mm_storel_epi64((__m128i*)(p + 192), _mm_unpackhi_epi64(low, low));
}
// Four blocks' factors, each for a quarter of the lanes.
TQ_INLINE F splat_quarters(const float* four) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return (F)_mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(four)));
}
// Up to 16 of a matrix's scales or biases, zeros behind them.
TQ_INLINE F load_floats(const void* p, std::size_t at, int count, Dtype dtype) {
    const __mmask16 mask = __mmask16((1u << count) - 1);
    if (dtype == Dtype::f32) return (F)_mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + at);
    const __m256i words = _mm256_maskz_loadu_epi16(mask, static_cast<const std::uint16_t*>(p) + at);
    if (dtype == Dtype::f16) return (F)_mm512_cvtph_ps(words);
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
}
// Powers of two from up to 16 exponents, a byte each, zeros behind them. An exponent of 0 counts as nothing.
TQ_INLINE F load_exponents(const void* p, std::size_t at, int count) {
    const __m128i bytes = _mm_maskz_loadu_epi8(__mmask16((1u << count) - 1), static_cast<const std::uint8_t*>(p) + at);
    return (F)_mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
}
// The lower eight, each twice.
TQ_INLINE F twice_each(F x) {
    return (F)_mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), (__m512)x);
}
TQ_INLINE void prefetch(const std::uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
// Of a unit's first half in the lower lanes, of the second one in the upper lanes.
TQ_INLINE F splat_halves(const float* two) { return (F)_mm512_mask_blend_ps(0xFF00, _mm512_set1_ps(two[0]), _mm512_set1_ps(two[1])); }
TQ_INLINE void store_inputs(std::int16_t* row, int at, I c) {
    auto* p = reinterpret_cast<std::uint8_t*>(row + at / 64 * 64) + at % 64;
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)((c + 128) >> 8)));
    _mm_storeu_si128((__m128i*)(p + 64), _mm512_cvtepi32_epi8((__m512i)c));
}
using Spread = B4;
TQ_INLINE Spread spread(B4 c) { return c; }
TQ_INLINE I dot_key(I acc, Spread c, const std::int32_t* words, const std::int32_t*) {
    const B4 q = (B4)splat(*words);
    return dot_us(acc, c, q);
}
TQ_INLINE I dot_value(I acc, Spread c, const std::uint32_t* words, const std::uint32_t*) {
    const B4 w = (B4)splat(std::int32_t(*words));
    return dot_us(acc, w, c);
}
TQ_INLINE F load_half(const void* p) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
TQ_INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
constexpr int kGemmRows = 8, kGemmVectors = 2;
constexpr int kFloatLutBits = 5;
struct FloatLut {
    __m512 low, high;
    static inline FloatLut make(const float* book, int bits) {
        alignas(64) float entries[32];
        for (int i = 0; i < 32; i++) entries[i] = book[i & ((1 << min1(bits, 5)) - 1)];
        return {_mm512_load_ps(entries), _mm512_load_ps(entries + 16)};
    }
};
TQ_INLINE F look_up_float(const FloatLut& lut, I index) { return (F)_mm512_permutex2var_ps((__m512)lut.low, (__m512i)index, (__m512)lut.high); }
TQ_INLINE F gather(const float* book, I index) { return (F)_mm512_i32gather_ps((__m512i)index, book, 4); }
TQ_INLINE float sum(F x) { return _mm512_reduce_add_ps((__m512)x); }
// sums[4 j + i] = sum(x[i][j]), bit for bit, in a third of the instructions.
#define TQ_OWN_SUMS
template <int M> TQ_INLINE void sums_of(const F (&x)[4][M], float* sums) {
    static_assert(M <= 4);
    __m512 eighths[4], halves[2];
    for (int i = 0; i < 4; i++) {
        __m512 pairs[2];
        for (int j = 0; j < 4; j += 2) {
            const __m512 a = (__m512)x[i][j < M ? j : M - 1], b = (__m512)x[i][j + 1 < M ? j + 1 : M - 1];
            pairs[j / 2] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
        }
        eighths[i] = _mm512_add_ps(_mm512_shuffle_f32x4(pairs[0], pairs[1], 0x88), _mm512_shuffle_f32x4(pairs[0], pairs[1], 0xDD));
    }
    for (int i = 0; i < 4; i += 2) halves[i / 2] = _mm512_add_ps(_mm512_shuffle_ps(eighths[i], eighths[i + 1], 0x44), _mm512_shuffle_ps(eighths[i], eighths[i + 1], 0xEE));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(halves[0], halves[1], 0x88), _mm512_shuffle_ps(halves[0], halves[1], 0xDD));
    _mm512_mask_storeu_ps(sums, __mmask16((1u << 4 * M) - 1), all);
}
#define TQ_VECTOR_REGISTER "v"
TQ_INLINE float maximum(F x) { return _mm512_reduce_max_ps((__m512)x); }
