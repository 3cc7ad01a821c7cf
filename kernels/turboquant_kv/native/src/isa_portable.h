// Any CPU: what the compiler makes of four-lane vectors and byte loops. Correct everywhere, fast nowhere.
#define LANES 4
#define TQ_OWN_TRELLIS
#include "isa_common.h"

constexpr const char* kName = "portable";
constexpr int kKeyLow = 0, kKeyHigh = 255, kValueLow = -127, kValueHigh = 127;
constexpr bool kSplit = false;
constexpr int kQueryLimit = 127, kWeightLimit = 255;

struct Lut {
    const std::uint8_t* entry;
    template <int Bits> static inline Lut make(const std::uint8_t* entry) { return {entry}; }
};
template <int Bits> TQ_INLINE B4 look_up(const Lut& lut, B4 index) {
    std::uint8_t bytes[4 * LANES];
    store_to(bytes, index);
    for (int i = 0; i < 4 * LANES; i++) bytes[i] = lut.entry[bytes[i] & ((1 << Bits) - 1)];
    return load<B4>(bytes);
}
template <int N> TQ_INLINE B4 shift_right(B4 x) { return x >> N; }
template <int N> TQ_INLINE B4 shift_left(B4 x) { return x << N; }
TQ_INLINE B4 join_3bit(B4 low, B4 high) { return (low & 3) | (high & 252); }
TQ_INLINE B4 load_nibbles(const std::uint8_t* p, int sub) {
    B4 x = load<B4>(p + 16 * (sub & 1));
    return sub & 2 ? x >> 4 : x;
}
struct Lut256 {
    const std::uint8_t* entry;
    static inline Lut256 make(const std::uint8_t* entry) { return {entry}; }
};
TQ_INLINE B4 look_up_256(const Lut256& lut, B4 index) { return look_up<8>(Lut{lut.entry}, index); }
struct TrellisLut {
    Lut level;
    static inline TrellisLut make(const IntTable& t) { return {Lut::make<5>(t.entry)}; }
};
template <int Bits> TQ_INLINE void look_up_trellis(const TrellisLut& t, B4 now, B4 before, B4 earlier, B4 top, B4 c[4]) {
    const B4 high = now ^ earlier;
    for (int j = 0; j < 4; j++) {
        B4 index = (before >> j & 1) | (high >> j & 1) << 1 | (now >> (4 + j) & 1) << 2;
        if constexpr (Bits >= 3) index |= (top >> (j ^ 1) & 1) << 3;
        if constexpr (Bits == 4) index |= (top >> (4 + (j ^ 1)) & 1) << 4;
        c[j] = look_up<5>(t.level, index);
    }
}
TQ_INLINE I dot_us(I acc, B4 a, B4 b) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 4; j++) acc[i] += int(a[4 * i + j]) * int(std::int8_t(b[4 * i + j]));
    return acc;
}
// Linear layers: a unit is eight parts of 8 neighbouring words, codes as well as inputs.
constexpr int kParts = 8;
typedef std::int16_t Part __attribute__((vector_size(16)));
using Dot = I;
TQ_INLINE Part load_part(const std::int16_t* unit, int part) { return load<Part>(unit + 8 * part); }
TQ_INLINE Dot dot_part(Dot acc, Part codes, Part inputs) {
    for (int i = 0; i < 8; i++) acc[i / 2] += int(codes[i]) * int(inputs[i]);
    return acc;
}
TQ_INLINE I dot_sum(Dot acc) { return acc; }
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
TQ_INLINE F load_half(const void* p) {
    std::uint16_t words[LANES];
    std::memcpy(words, p, sizeof words);
    F x{};
    for (int i = 0; i < LANES; i++) x[i] = half_to_float(words[i]);
    return x;
}
TQ_INLINE F fma(F a, F b, F c) { return a * b + c; }
constexpr int kGemmRows = 4, kGemmVectors = 2;
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
TQ_INLINE float sum(F x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}
TQ_INLINE float maximum(F x) {
    float best = x[0];
    for (int i = 1; i < LANES; i++) best = fmax1(best, x[i]);
    return best;
}
#if defined(__x86_64__)
#define TQ_VECTOR_REGISTER "x"
#elif defined(__aarch64__)
#define TQ_VECTOR_REGISTER "w"
#else
#define TQ_VECTOR_REGISTER "m"
#endif
