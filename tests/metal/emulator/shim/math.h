// Metal's math, common, integer and relational functions, for scalars and vectors, in metal:: and in its namespaces
// fast:: and precise::, which are the same here: accurate. Leaves out what kernels for caches have no use for.
#pragma once
#include "types.h"

namespace metal {

#define EMU_UNARY(name, expression)                                                                            \
    template <class T> requires is_floating_point_v<T> inline T name(T value) { float x = (float)value; return T(expression); } \
    template <class T, int N> requires is_floating_point_v<T> inline vec<T, N> name(vec<T, N> v) { return by_lane<T, N>([&](int i) { return name(v[i]); }); }
#define EMU_BINARY(name, expression)                                                                           \
    template <class T> requires is_floating_point_v<T> inline T name(T a, T b) { float x = (float)a, y = (float)b; return T(expression); } \
    template <class T, int N> requires is_floating_point_v<T> inline vec<T, N> name(vec<T, N> a, vec<T, N> b) { return by_lane<T, N>([&](int i) { return name(a[i], b[i]); }); }
#define EMU_MATH_SET                                                                                              \
    EMU_UNARY(exp, __builtin_expf(x)) EMU_UNARY(exp2, __builtin_exp2f(x)) EMU_UNARY(exp10, __builtin_powf(10.0f, x)) \
    EMU_UNARY(log, __builtin_logf(x)) EMU_UNARY(log2, __builtin_log2f(x)) EMU_UNARY(log10, __builtin_log10f(x)) \
    EMU_UNARY(sqrt, __builtin_sqrtf(x)) EMU_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))                            \
    EMU_UNARY(sin, __builtin_sinf(x)) EMU_UNARY(cos, __builtin_cosf(x)) EMU_UNARY(tan, __builtin_tanf(x))      \
    EMU_UNARY(tanh, __builtin_tanhf(x)) EMU_UNARY(sinh, __builtin_sinhf(x)) EMU_UNARY(cosh, __builtin_coshf(x)) \
    EMU_UNARY(asin, __builtin_asinf(x)) EMU_UNARY(acos, __builtin_acosf(x)) EMU_UNARY(atan, __builtin_atanf(x)) \
    EMU_UNARY(floor, __builtin_floorf(x)) EMU_UNARY(ceil, __builtin_ceilf(x)) EMU_UNARY(trunc, __builtin_truncf(x)) \
    EMU_UNARY(round, __builtin_roundf(x)) EMU_UNARY(rint, __builtin_rintf(x)) EMU_UNARY(fract, x - __builtin_floorf(x)) \
    EMU_UNARY(fabs, __builtin_fabsf(x)) EMU_BINARY(pow, __builtin_powf(x, y)) EMU_BINARY(powr, __builtin_powf(x, y)) \
    EMU_BINARY(atan2, __builtin_atan2f(x, y)) EMU_BINARY(fmod, __builtin_fmodf(x, y))                          \
    EMU_BINARY(copysign, __builtin_copysignf(x, y)) EMU_BINARY(fmax, __builtin_fmaxf(x, y)) EMU_BINARY(fmin, __builtin_fminf(x, y)) \
    EMU_UNARY(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x)
EMU_MATH_SET
namespace fast { EMU_MATH_SET }
namespace precise { EMU_MATH_SET }

template <class T> requires is_scalar_v<T> constexpr T abs(T x) { return x < T(0) ? T(-x) : x; }
template <class T> requires is_scalar_v<T> constexpr T min(T a, T b) { return b < a || (a != a) ? b : a; }
template <class T> requires is_scalar_v<T> constexpr T max(T a, T b) { return a < b || (a != a) ? b : a; }
template <class T> requires is_scalar_v<T> constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T> constexpr T max3(T a, T b, T c) { return max(max(a, b), c); }
template <class T> constexpr T min3(T a, T b, T c) { return min(min(a, b), c); }
template <class T, int N> constexpr vec<T, N> abs(vec<T, N> v) { return by_lane<T, N>([&](int i) { return abs(v[i]); }); }
template <class T, int N> constexpr vec<T, N> min(vec<T, N> a, vec<T, N> b) { return by_lane<T, N>([&](int i) { return min(a[i], b[i]); }); }
template <class T, int N> constexpr vec<T, N> max(vec<T, N> a, vec<T, N> b) { return by_lane<T, N>([&](int i) { return max(a[i], b[i]); }); }
template <class T, int N> constexpr vec<T, N> clamp(vec<T, N> v, std::type_identity_t<T> low, std::type_identity_t<T> high) { return by_lane<T, N>([&](int i) { return clamp(v[i], low, high); }); }
template <class T, int N> constexpr vec<T, N> clamp(vec<T, N> v, vec<T, N> low, vec<T, N> high) { return min(max(v, low), high); }
namespace fast { using metal::abs, metal::min, metal::max, metal::clamp; }
namespace precise { using metal::abs, metal::min, metal::max, metal::clamp; }

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline half fma(half a, half b, half c) { return half((double)a * (double)b + (double)c); }
inline bfloat fma(bfloat a, bfloat b, bfloat c) { return bfloat(__builtin_fmaf(a, b, c)); }
template <class T, int N> inline vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) { return by_lane<T, N>([&](int i) { return fma(a[i], b[i], c[i]); }); }
template <class T> requires is_floating_point_v<T> inline T mix(T a, T b, T t) { return a + (b - a) * t; }
template <class T> requires is_floating_point_v<T> inline T ldexp(T x, int n) { return T(__builtin_ldexpf((float)x, n)); }
template <class T> requires is_floating_point_v<T> inline T frexp(T x, int& n) { return T(__builtin_frexpf((float)x, &n)); }
template <class T, int N> requires is_floating_point_v<T> inline T dot(vec<T, N> a, vec<T, N> b) {
    T total = a[0] * b[0];
    for (int i = 1; i < N; ++i) total = T(total + a[i] * b[i]);
    return total;
}
template <class T, int N> inline T length(vec<T, N> v) { return sqrt(dot(v, v)); }

template <class T> requires is_floating_point_v<T> inline bool isnan(T x) { return (float)x != (float)x; }
template <class T> requires is_floating_point_v<T> inline bool isinf(T x) { return __builtin_isinf((float)x); }
template <class T> requires is_floating_point_v<T> inline bool isfinite(T x) { return __builtin_isfinite((float)x); }
template <class T> requires is_floating_point_v<T> inline bool signbit(T x) { return __builtin_signbit((float)x); }
template <class T> requires is_scalar_v<T> constexpr T select(T a, T b, bool c) { return c ? b : a; }
template <class T, int N> constexpr vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) { return by_lane<T, N>([&](int i) { return c[i] ? b[i] : a[i]; }); }
template <int N> constexpr bool any(vec<bool, N> v) { for (int i = 0; i < N; ++i) if (v[i]) return true; return false; }
template <int N> constexpr bool all(vec<bool, N> v) { for (int i = 0; i < N; ++i) if (!v[i]) return false; return true; }

template <class T> using word_of = std::make_unsigned_t<T>;
template <class T> requires std::is_integral_v<T> constexpr T popcount(T x) { return T(__builtin_popcountll(word_of<T>(x))); }
template <class T> requires std::is_integral_v<T> constexpr T clz(T x) { return word_of<T>(x) ? T(__builtin_clzll(word_of<T>(x)) - (64 - 8 * (int)sizeof(T))) : T(8 * sizeof(T)); }
template <class T> requires std::is_integral_v<T> constexpr T ctz(T x) { return word_of<T>(x) ? T(__builtin_ctzll(word_of<T>(x))) : T(8 * sizeof(T)); }
constexpr uint mulhi(uint a, uint b) { return uint(((uint64_t)a * b) >> 32); }
constexpr int mulhi(int a, int b) { return int(((int64_t)a * b) >> 32); }
template <class T> requires std::is_integral_v<T> constexpr T mul24(T a, T b) { return T(a * b); }
template <class T> requires std::is_integral_v<T> constexpr T mad24(T a, T b, T c) { return T(a * b + c); }
template <class T> requires std::is_integral_v<T> constexpr T rotate(T x, T n) {
    constexpr int width = 8 * sizeof(T);
    int by = int(n) & (width - 1);
    return by ? T((word_of<T>(x) << by) | (word_of<T>(x) >> (width - by))) : x;
}
template <class T> requires std::is_integral_v<T> constexpr T extract_bits(T x, uint offset, uint bits) {
    if (bits == 0) return T(0);
    return T(T(word_of<T>(x) << (8 * sizeof(T) - bits - offset)) >> (8 * sizeof(T) - bits));
}
template <class T> requires std::is_integral_v<T> constexpr T insert_bits(T base, T x, uint offset, uint bits) {
    word_of<T> mask = word_of<T>((bits < 8 * sizeof(T) ? (word_of<T>(1) << bits) - 1 : ~word_of<T>(0)) << offset);
    return T((word_of<T>(base) & ~mask) | ((word_of<T>(x) << offset) & mask));
}
template <class T> requires std::is_integral_v<T> constexpr T reverse_bits(T x) {
    word_of<T> from = x, to = 0;
    for (unsigned i = 0; i < 8 * sizeof(T); ++i) to = word_of<T>(to << 1 | (from >> i & 1));
    return T(to);
}
inline float2 unpack_unorm2x16_to_float(uint w) { return float2((w & 0xffff) / 65535.0f, (w >> 16) / 65535.0f); }
inline float4 unpack_unorm4x8_to_float(uint w) { return float4((w & 255) / 255.0f, (w >> 8 & 255) / 255.0f, (w >> 16 & 255) / 255.0f, (w >> 24) / 255.0f); }

} // namespace metal

#undef INFINITY
#undef NAN
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define MAXHALF half(65504.0f)
#define HALF_MAX half(65504.0f)
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
