// AVX2 with FMA and F16C. The byte product (maddubs) saturates at 16 bits, which leaves 7 bits for centroids: an error a
// tenth of the 4-bit codec's own and no less. So bytes are multiplied as 16-bit words, even and odd ones apart; queries
// and weights are split beforehand and keep 12 bits.
#define LANES 8
#include "isa_common.h"

constexpr const char* kName = "avx2";
constexpr int kKeyLow = 0, kKeyHigh = 255, kValueLow = 0, kValueHigh = 255;
constexpr bool kSplit = true;
constexpr int kQueryLimit = 2047, kWeightLimit = 4095;

struct Lut {
    __m256i table;
    template <int Bits> static inline Lut make(const std::uint8_t* entry) {
        return {_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)entry))};
    }
};
template <int Bits> TQ_INLINE B4 look_up(const Lut& lut, B4 index) {
    // The table repeats, so four bits may stay; the shuffle zeroes where bit 7 is set.
    return (B4)_mm256_shuffle_epi8(lut.table, _mm256_and_si256((__m256i)index, _mm256_set1_epi8(15)));
}
// By the low four bits of indices below 128.
TQ_INLINE B4 look_up_below_128(const Lut& lut, B4 index) { return (B4)_mm256_shuffle_epi8(lut.table, (__m256i)index); }
// `a` where bit 7 of `which` is set, else `b`.
TQ_INLINE B4 choose_by_top_bit(B4 which, B4 a, B4 b) { return (B4)_mm256_blendv_epi8((__m256i)b, (__m256i)a, (__m256i)which); }
template <int N> TQ_INLINE B4 shift_right(B4 x) { return (B4)_mm256_srli_epi16((__m256i)x, N); }
template <int N> TQ_INLINE B4 shift_left(B4 x) { return (B4)_mm256_slli_epi16((__m256i)x, N); }
TQ_INLINE B4 join_3bit(B4 low, B4 high) {
    __m256i three = _mm256_set1_epi8(3);
    return (B4)_mm256_or_si256(_mm256_and_si256((__m256i)low, three), _mm256_andnot_si256(three, (__m256i)high));
}
TQ_INLINE B4 load_nibbles(const std::uint8_t* p, int sub) {
    __m256i x = _mm256_loadu_si256((const __m256i*)p);
    return (B4)(sub ? _mm256_srli_epi16(x, 4) : x);
}
// 16 rows of 16 entries, each row the exclusive or of itself with the row before: an index in row r has passed rows 0 to r
// when all that it reaches is combined, which leaves row r. A shuffle gives 0 where bit 7 is set, and falling by 16 a row
// with saturation, an index keeps bit 7 once its own row is behind it. Rows 8 to 15 begin again with bit 7 flipped.
struct Lut256 {
    __m256i row[16];
    static inline Lut256 make(const std::uint8_t* entry) {
        Lut256 lut;
        __m128i before = _mm_setzero_si128();
        for (int r = 0; r < 16; r++) {
            const __m128i here = _mm_loadu_si128((const __m128i*)(entry + 16 * r));
            lut.row[r] = _mm256_broadcastsi128_si256(r == 8 ? here : _mm_xor_si128(here, before));
            before = here;
        }
        return lut;
    }
};
TQ_INLINE B4 look_up_256(const Lut256& lut, B4 index) {
    const __m256i step = _mm256_set1_epi8(16);
    __m256i low = (__m256i)index, high = _mm256_xor_si256(low, _mm256_set1_epi8(-128));
    __m256i x = _mm256_shuffle_epi8(lut.row[0], low), y = _mm256_shuffle_epi8(lut.row[8], high);
    for (int r = 1; r < 8; r++) {
        low = _mm256_subs_epi8(low, step);
        high = _mm256_subs_epi8(high, step);
        x = _mm256_xor_si256(x, _mm256_shuffle_epi8(lut.row[r], low));
        y = _mm256_xor_si256(y, _mm256_shuffle_epi8(lut.row[8 + r], high));
    }
    return (B4)_mm256_xor_si256(x, y);
}
// Exact for all bytes: even and odd bytes as 16-bit words.
TQ_INLINE I dot_us(I acc, B4 a, B4 b) {
    __m256i x = (__m256i)a, y = (__m256i)b;
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(y, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(y, 8));
    return (I)_mm256_add_epi32((__m256i)acc, _mm256_add_epi32(even, odd));
}
// Linear layers: a unit is four registers of 16 neighbouring words, codes as well as inputs.
constexpr int kParts = 4;
using Part = __m256i;
using Dot = __m256i;
TQ_INLINE Part load_part(const std::int16_t* unit, int part) { return _mm256_loadu_si256((const __m256i*)(unit + 16 * part)); }
TQ_INLINE Dot dot_part(Dot acc, Part codes, Part inputs) { return _mm256_add_epi32(acc, _mm256_madd_epi16(codes, inputs)); }
TQ_INLINE I dot_sum(Dot acc) { return (I)acc; }
#define TQ_OWN_SMALL_UNPACKING
TQ_INLINE void store_words(__m128i bytes, std::int16_t* out) { _mm256_storeu_si256((__m256i*)out, _mm256_cvtepu8_epi16(bytes)); }
TQ_INLINE void unpack_8bit(const std::uint8_t* p, std::int16_t* out) {
    for (int i = 0; i < 64; i += 16) store_words(_mm_loadu_si128((const __m128i*)(p + i)), out + i);
}
// The low and the high `Bits` bits of each byte, which are neighbours: 16 bytes become 32.
template <int Bits> TQ_INLINE void part_bytes(__m128i x, __m128i out[2]) {
    const __m128i mask = _mm_set1_epi8((1 << Bits) - 1);
    const __m128i low = _mm_and_si128(x, mask), high = _mm_and_si128(_mm_srli_epi16(x, Bits), mask);
    out[0] = _mm_unpacklo_epi8(low, high), out[1] = _mm_unpackhi_epi8(low, high);
}
// 4-bit codes lie across a unit's parts: word t of part s is code 4 t + s, which is how four shifts of 16 words leave them. Half a
// register is half a unit then.
#define TQ_OWN_NIBBLES
constexpr bool kNibbles = true;
TQ_INLINE void nibble_parts(const std::uint8_t* p, Part c[4]) {
    const __m256i x = _mm256_loadu_si256((const __m256i*)p), mask = _mm256_set1_epi16(15);
    c[0] = _mm256_and_si256(x, mask);
    c[1] = _mm256_and_si256(_mm256_srli_epi16(x, 4), mask);
    c[2] = _mm256_and_si256(_mm256_srli_epi16(x, 8), mask);
    c[3] = _mm256_srli_epi16(x, 12);
}
TQ_INLINE void byte_parts(const std::uint8_t* p, Part c[4]) {
    for (int s = 0; s < 4; s++) c[s] = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(p + 16 * s)));
}
TQ_INLINE void unpack_4bit(const std::uint8_t* p, std::int16_t* out) {
    Part c[4];
    nibble_parts(p, c);
    for (int s = 0; s < 4; s++) _mm256_storeu_si256((__m256i*)(out + 16 * s), c[s]);
}
// Eight inputs, the first a multiple of eight: two words of each part.
TQ_INLINE void store_nibble_inputs(std::int16_t* row, int at, I c) {
    const __m128i low = _mm256_castsi256_si128((__m256i)c), high = _mm256_extracti128_si256((__m256i)c, 1);
    std::int32_t two[4];
    store_to(two, _mm_blend_epi16(low, _mm_slli_epi32(high, 16), 0xAA));
    std::int16_t* to = row + at / 64 * 64 + at % 64 / 4;
    for (int s = 0; s < 4; s++) std::memcpy(to + 16 * s, two + s, 4);
}
TQ_INLINE void prefetch(const std::uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
TQ_INLINE F splat_halves(const float* two) { return (F)_mm256_blend_ps(_mm256_set1_ps(two[0]), _mm256_set1_ps(two[1]), 0xF0); }
TQ_INLINE void unpack_2bit(const std::uint8_t* p, std::int16_t* out) {
    __m128i pairs[2], bytes[2];
    part_bytes<4>(_mm_loadu_si128((const __m128i*)p), pairs);
    for (int s = 0; s < 2; s++) {
        part_bytes<2>(pairs[s], bytes);
        for (int i = 0; i < 2; i++) store_words(bytes[i], out + 32 * s + 16 * i);
    }
}
struct Spread {
    __m256i even, odd;
};
TQ_INLINE Spread spread(B4 c) { return {_mm256_and_si256((__m256i)c, _mm256_set1_epi16(255)), _mm256_srli_epi16((__m256i)c, 8)}; }
TQ_INLINE I dot_spread(I acc, Spread c, std::int32_t even, std::int32_t odd) {
    const __m256i a = _mm256_madd_epi16(c.even, _mm256_set1_epi32(even)), b = _mm256_madd_epi16(c.odd, _mm256_set1_epi32(odd));
    return (I)_mm256_add_epi32((__m256i)acc, _mm256_add_epi32(a, b));
}
TQ_INLINE I dot_key(I acc, Spread c, const std::int32_t* even, const std::int32_t* odd) { return dot_spread(acc, c, *even, *odd); }
TQ_INLINE I dot_value(I acc, Spread c, const std::uint32_t* even, const std::uint32_t* odd) {
    return dot_spread(acc, c, std::int32_t(*even), std::int32_t(*odd));
}
TQ_INLINE F load_half(const void* p) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
TQ_INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
constexpr int kGemmRows = 6, kGemmVectors = 2;
constexpr int kFloatLutBits = 4;
struct FloatLut {
    __m256 low, high;
    static inline FloatLut make(const float* book, int bits) {
        alignas(32) float entries[16];
        for (int i = 0; i < 16; i++) entries[i] = book[i & ((1 << min1(bits, 4)) - 1)];
        return {_mm256_load_ps(entries), _mm256_load_ps(entries + 8)};
    }
};
TQ_INLINE F look_up_float(const FloatLut& lut, I index) {
    __m256i i = (__m256i)index;
    __m256 low = _mm256_permutevar8x32_ps(lut.low, i), high = _mm256_permutevar8x32_ps(lut.high, i);
    return (F)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
TQ_INLINE F gather(const float* book, I index) { return (F)_mm256_i32gather_ps(book, (__m256i)index, 4); }
TQ_INLINE float sum(F x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
TQ_INLINE float maximum(F x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
#define TQ_VECTOR_REGISTER "x"
