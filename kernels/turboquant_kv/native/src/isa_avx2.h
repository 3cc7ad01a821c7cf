// AVX2 with FMA and F16C. maddubs saturates at 16 bits, so table entries keep to 7 bits (127 * 127 * 2 < 2^15).
#define LANES 8
#include "isa_common.h"

constexpr const char* kName = "avx2";
constexpr int kKeyLow = 0, kKeyHigh = 127, kValueLow = -63, kValueHigh = 63;

struct Lut {
    __m256i table;
    template <int Bits> static inline Lut make(const std::uint8_t* entry) {
        alignas(32) std::uint8_t bytes[32];
        for (int i = 0; i < 32; i++) bytes[i] = entry[i & ((1 << Bits) - 1)];
        return {_mm256_load_si256((const __m256i*)bytes)};
    }
};
template <int Bits> TQ_INLINE B4 look_up(const Lut& lut, B4 index) {
    // The table repeats, so four bits may stay; the shuffle zeroes where bit 7 is set.
    return (B4)_mm256_shuffle_epi8(lut.table, _mm256_and_si256((__m256i)index, _mm256_set1_epi8(15)));
}
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
struct Lut256 {
    const std::uint8_t* entry;
    static inline Lut256 make(const std::uint8_t* entry) { return {entry}; }
};
TQ_INLINE B4 look_up_256(const Lut256& lut, B4 index) {
    alignas(32) std::uint8_t bytes[32];
    store_to(bytes, index);
    for (int i = 0; i < 32; i++) bytes[i] = lut.entry[bytes[i]];
    return load<B4>(bytes);
}
// Exact for all bytes: even and odd bytes as 16-bit words.
TQ_INLINE I dot_us(I acc, B4 a, B4 b) {
    __m256i x = (__m256i)a, y = (__m256i)b;
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(y, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(y, 8));
    return (I)_mm256_add_epi32((__m256i)acc, _mm256_add_epi32(even, odd));
}
TQ_INLINE I dot_small(I acc, B4 a, B4 b) {
    __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
    return (I)_mm256_add_epi32((__m256i)acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
TQ_INLINE I dot_key(I acc, B4 c, B4 q) { return dot_small(acc, c, q); }
TQ_INLINE I dot_value(I acc, B4 w, B4 c) { return dot_small(acc, w, c); }
TQ_INLINE F load_half(const void* p) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
TQ_INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
constexpr int kGemmRows = 6, kGemmVectors = 2;
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
