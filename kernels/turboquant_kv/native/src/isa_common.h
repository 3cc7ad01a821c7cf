// Lane arithmetic that compilers express alike for every instruction set (GCC and Clang vector extensions).
//
// Included inside each level's own namespace, after it defined LANES, so that no inline function is shared between
// translation units that were compiled with different flags.
typedef float F __attribute__((vector_size(4 * LANES)));
typedef std::int32_t I __attribute__((vector_size(4 * LANES)));
typedef std::uint8_t B4 __attribute__((vector_size(4 * LANES)));
typedef std::uint8_t B1 __attribute__((vector_size(LANES)));
typedef std::uint16_t H __attribute__((vector_size(2 * LANES)));
typedef std::uint32_t U __attribute__((vector_size(4 * LANES)));

constexpr int SUBS = 16 / LANES; // registers that hold 16 lanes
#define TQ_INLINE static inline __attribute__((always_inline))
#define TQ_INLINED __attribute__((always_inline)) // of a lambda

// By copy: template arguments lose a vector type's alignment attribute, and pointers here are rarely aligned.
template <class T> TQ_INLINE T load(const void* p) {
    T x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
template <class T> TQ_INLINE void store_to(void* p, T x) { __builtin_memcpy(p, &x, sizeof x); }
TQ_INLINE F splat(float x) { return x - F{}; } // a sum with zero would be computed: it changes the sign of -0
TQ_INLINE I splat(std::int32_t x) { return I{} + x; }
TQ_INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
TQ_INLINE F vmax(F a, F b) { return a > b ? a : b; }
TQ_INLINE float fmax1(float a, float b) { return a > b ? a : b; }
template <class T> TQ_INLINE T min1(T a, T b) { return a < b ? a : b; }
template <class T> TQ_INLINE T max1(T a, T b) { return a > b ? a : b; }

// Round to nearest for |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the mantissa.
TQ_INLINE I round_to_int(F x) {
    F shifted = x + 12582912.0f;
    return (I)shifted - 0x4B400000;
}

// (2^f - 1) / f for f in [-0.5, 0.5], so that 2^f gets a relative error of 1e-7: a polynomial fitted for the smallest
// largest one.
TQ_INLINE F exp2_slope(F f) {
    F p = splat(1.32764715e-3f);
    p = p * f + 9.67554133e-3f;
    p = p * f + 5.55071327e-2f;
    p = p * f + 2.40221197e-1f;
    return p * f + 6.93146967e-1f;
}
TQ_INLINE F exp2_fraction(F f) { return exp2_slope(f) * f + 1.0f; }

// 2^x - 1 for x <= 0, relative error 2e-7 near 0 as well. NaN stays NaN.
TQ_INLINE F exp2_minus_1(F x) {
    x = x < splat(-60.0f) ? splat(-60.0f) : x; // in this order NaN is no less
    const I whole = round_to_int(x);
    const F power = (F)((127 + whole) << 23), f = x - to_float(whole);
    return power * (exp2_slope(f) * f) + (power - 1.0f);
}

#if !defined(TQ_OWN_ROUNDING)
// 2^x for x <= 0; anything below -126, -inf included, gives about 1e-38. NaN gives anything.
TQ_INLINE F exp2_negative(F x) {
    x = vmax(x, splat(-126.0f));
    const I whole = round_to_int(x);
    return (F)((I)exp2_fraction(x - to_float(whole)) + (whole << 23));
}
// Rounded to bytes; x in [0, 255].
TQ_INLINE B1 to_bytes(F x) { return __builtin_convertvector(round_to_int(x), B1); }
#endif

TQ_INLINE float half_to_float(std::uint16_t h) {
    // Exponent and mantissa moved into place and rescaled; infinities and NaNs keep their exponent full.
    std::uint32_t magnitude = std::uint32_t(h & 0x7FFF) << 13, sign = std::uint32_t(h & 0x8000) << 16, bits;
    float x;
    std::memcpy(&x, &magnitude, 4);
    x *= 5.192296858534828e33f; // 2^112
    std::memcpy(&bits, &x, 4);
    if ((h & 0x7C00) == 0x7C00) bits |= 0x7F800000;
    bits |= sign;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Nearest even; overflow goes to infinity.
TQ_INLINE std::uint16_t float_to_half(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const std::uint32_t sign = (bits >> 16) & 0x8000;
    bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) return std::uint16_t(sign | 0x7E00);
    if (bits >= 0x477FF000) return std::uint16_t(sign | 0x7C00);
    if (bits < 0x38800000) { // subnormal: let the adder round
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        std::memcpy(&bits, &magnitude, 4);
        return std::uint16_t(sign | (bits - 0x3F000000));
    }
    bits += 0xC8000FFF + ((bits >> 13) & 1);
    return std::uint16_t(sign | (bits >> 13));
}

// Nearest even.
TQ_INLINE std::uint16_t float_to_bf16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return 0x7FC0;
    return std::uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

TQ_INLINE float bf16_to_float(std::uint16_t h) {
    std::uint32_t bits = std::uint32_t(h) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
