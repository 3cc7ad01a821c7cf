// AArch64 with the dot-product extension. It multiplies signed by signed or unsigned by unsigned bytes only, so keys
// are signed centroids against a signed query, values unsigned centroids against unsigned weights.
#define LANES 4
#include "isa_common.h"

constexpr const char* kName = "neon-dotprod";
constexpr int kKeyLow = -127, kKeyHigh = 127, kValueLow = 0, kValueHigh = 255;
constexpr bool kSplit = false;
constexpr int kQueryLimit = 127, kWeightLimit = 255;

struct Lut {
    uint8x16_t table;
    template <int Bits> static inline Lut make(const std::uint8_t* entry) {
        return {vld1q_u8(entry)};
    }
};
template <int Bits> TQ_INLINE B4 look_up(const Lut& lut, B4 index) {
    return (B4)vqtbl1q_u8(lut.table, vandq_u8((uint8x16_t)index, vdupq_n_u8(15)));
}
TQ_INLINE B4 look_up_below_128(const Lut& lut, B4 index) { return look_up<4>(lut, index); }
// `a` where bit 7 of `which` is set, else `b`.
TQ_INLINE B4 choose_by_top_bit(B4 which, B4 a, B4 b) {
    return (B4)vbslq_u8(vreinterpretq_u8_s8(vshrq_n_s8((int8x16_t)which, 7)), (uint8x16_t)a, (uint8x16_t)b);
}
template <int N> TQ_INLINE B4 shift_right(B4 x) {
    if constexpr (N == 0) return x;
    else return (B4)vshrq_n_u8((uint8x16_t)x, N);
}
template <int N> TQ_INLINE B4 shift_left(B4 x) { return (B4)vshlq_n_u8((uint8x16_t)x, N); }
TQ_INLINE B4 join_3bit(B4 low, B4 high) { return (B4)vbslq_u8(vdupq_n_u8(3), (uint8x16_t)low, (uint8x16_t)high); }
TQ_INLINE B4 load_nibbles(const std::uint8_t* p, int sub) {
    uint8x16_t x = vld1q_u8(p + 16 * (sub & 1));
    return (B4)(sub & 2 ? vshrq_n_u8(x, 4) : x);
}
// Four look-ups of 64 entries; an index outside of a table leaves what the tables before it gave.
struct Lut256 {
    uint8x16x4_t part[4];
    static inline Lut256 make(const std::uint8_t* entry) {
        Lut256 lut;
        for (int i = 0; i < 16; i++) lut.part[i / 4].val[i % 4] = vld1q_u8(entry + 16 * i);
        return lut;
    }
};
TQ_INLINE B4 look_up_256(const Lut256& lut, B4 index) {
    const uint8x16_t i = (uint8x16_t)index;
    uint8x16_t x = vqtbl4q_u8(lut.part[0], i);
    for (int p = 1; p < 4; p++) x = vqtbx4q_u8(x, lut.part[p], vsubq_u8(i, vdupq_n_u8(64 * p)));
    return (B4)x;
}
// a = (a - 128) + 64 + 64 in signed bytes.
TQ_INLINE I dot_us(I acc, B4 a, B4 b) {
    int8x16_t y = (int8x16_t)b, half = vdupq_n_s8(64);
    int32x4_t sum = vdotq_s32((int32x4_t)acc, vreinterpretq_s8_u8(veorq_u8((uint8x16_t)a, vdupq_n_u8(128))), y);
    return (I)vdotq_s32(vdotq_s32(sum, y, half), y, half);
}
// Linear layers: a unit is eight registers of 8 neighbouring words, codes as well as inputs.
constexpr int kParts = 8;
using Part = int16x8_t;
struct Dot { // of the words' lower and upper halves
    int32x4_t low, high;
};
TQ_INLINE Part load_part(const std::int16_t* unit, int part) { return vld1q_s16(unit + 8 * part); }
TQ_INLINE Dot dot_part(Dot acc, Part codes, Part inputs) {
    return {vmlal_s16(acc.low, vget_low_s16(codes), vget_low_s16(inputs)), vmlal_high_s16(acc.high, codes, inputs)};
}
TQ_INLINE I dot_sum(Dot acc) { return (I)vaddq_s32(acc.low, acc.high); }
#define TQ_OWN_SMALL_UNPACKING
TQ_INLINE void store_words(uint8x16_t bytes, std::int16_t* out) {
    vst1q_s16(out, vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes))));
    vst1q_s16(out + 8, vreinterpretq_s16_u16(vmovl_high_u8(bytes)));
}
TQ_INLINE void unpack_8bit(const std::uint8_t* p, std::int16_t* out) {
    for (int i = 0; i < 64; i += 16) store_words(vld1q_u8(p + i), out + i);
}
// The low and the high `Bits` bits of each byte, which are neighbours: 16 bytes become 32.
template <int Bits> TQ_INLINE uint8x16x2_t part_bytes(uint8x16_t x) {
    const uint8x16_t mask = vdupq_n_u8((1 << Bits) - 1);
    return vzipq_u8(vandq_u8(x, mask), vandq_u8(vshrq_n_u8(x, Bits), mask));
}
TQ_INLINE void unpack_4bit(const std::uint8_t* p, std::int16_t* out) {
    for (int s = 0; s < 2; s++) {
        const uint8x16x2_t bytes = part_bytes<4>(vld1q_u8(p + 16 * s));
        for (int i = 0; i < 2; i++) store_words(bytes.val[i], out + 32 * s + 16 * i);
    }
}
TQ_INLINE void unpack_2bit(const std::uint8_t* p, std::int16_t* out) {
    const uint8x16x2_t pairs = part_bytes<4>(vld1q_u8(p));
    for (int s = 0; s < 2; s++) {
        const uint8x16x2_t bytes = part_bytes<2>(pairs.val[s]);
        for (int i = 0; i < 2; i++) store_words(bytes.val[i], out + 32 * s + 16 * i);
    }
}
using Spread = B4;
TQ_INLINE Spread spread(B4 c) { return c; }
TQ_INLINE I dot_key(I acc, Spread c, const std::int32_t* words, const std::int32_t*) {
    const B4 q = (B4)splat(*words);
    return (I)vdotq_s32((int32x4_t)acc, (int8x16_t)c, (int8x16_t)q);
}
TQ_INLINE I dot_value(I acc, Spread c, const std::uint32_t* words, const std::uint32_t*) {
    const B4 w = (B4)splat(std::int32_t(*words));
    return (I)vdotq_u32((uint32x4_t)acc, (uint8x16_t)w, (uint8x16_t)c);
}
TQ_INLINE F load_half(const void* p) { return (F)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const std::uint16_t*)p))); }
TQ_INLINE F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
constexpr int kGemmRows = 8, kGemmVectors = 2;
constexpr int kFloatLutBits = 8;
TQ_INLINE F gather(const float* book, I index) {
    F x{};
    for (int i = 0; i < LANES; i++) x[i] = book[index[i]];
    return x;
}
struct FloatLut {
    const float* book;
    static inline FloatLut make(const float* book, int) { return {book}; }
};
TQ_INLINE F look_up_float(const FloatLut& lut, I index) { return gather(lut.book, index); }
TQ_INLINE float sum(F x) { return vaddvq_f32((float32x4_t)x); }
TQ_INLINE float maximum(F x) { return vmaxvq_f32((float32x4_t)x); }
#define TQ_VECTOR_REGISTER "w"
