// Metal's scalar and vector types. Owns half, bfloat, vec<T, n> with constructors, arithmetic and swizzles, packed
// vectors, as_type and numeric limits. Arithmetic in half and bfloat rounds after every operation, as on the GPU.
#pragma once
#include "hooks.h"
#include <limits>
#include <type_traits>

namespace metal {

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef _Float16 float16_t;
typedef decltype(sizeof(0)) size_t;
typedef long ptrdiff_t;

using std::conditional_t, std::enable_if_t, std::enable_if, std::is_same_v, std::is_same, std::true_type, std::false_type;
using std::is_integral_v, std::is_signed_v, std::is_unsigned_v, std::integral_constant, std::make_unsigned_t, std::conditional;
using std::is_convertible_v, std::remove_reference_t, std::remove_cv_t, std::bool_constant;

struct bfloat {
    uint16_t bits;
    bfloat() = default;
    template <class T> requires std::is_arithmetic_v<T> || std::is_same_v<T, half>
    constexpr bfloat(T value) : bits(rounded((float)value)) {}
    constexpr operator float() const { return __builtin_bit_cast(float, (uint32_t)bits << 16); }
    static constexpr bfloat from_bits(uint16_t given) { bfloat made(0); made.bits = given; return made; }
    static constexpr uint16_t rounded(float value) {
        uint32_t word = __builtin_bit_cast(uint32_t, value);
        if ((word & 0x7fffffff) > 0x7f800000) return 0x7fc0;
        return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
    }
};
typedef bfloat bfloat16_t;
#define EMU_BF(op)                                                                                             \
    constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat((float)a op (float)b); }                  \
    template <class T> requires std::is_integral_v<T>                                                          \
    constexpr bfloat operator op(bfloat a, T b) { return bfloat((float)a op (float)b); }                       \
    template <class T> requires std::is_integral_v<T>                                                          \
    constexpr bfloat operator op(T a, bfloat b) { return bfloat((float)a op (float)b); }                       \
    constexpr float operator op(bfloat a, float b) { return (float)a op b; }                                   \
    constexpr float operator op(float a, bfloat b) { return a op (float)b; }                                   \
    constexpr float operator op(bfloat a, half b) { return (float)a op (float)b; }                             \
    constexpr float operator op(half a, bfloat b) { return (float)a op (float)b; }                             \
    template <class T> constexpr bfloat& operator op##=(bfloat& a, T b) { return a = bfloat((float)a op (float)b); }
EMU_BF(+) EMU_BF(-) EMU_BF(*) EMU_BF(/)
#undef EMU_BF
constexpr bfloat operator-(bfloat a) { return bfloat::from_bits(a.bits ^ 0x8000); }

template <class T> inline constexpr bool is_floating_point_v = std::is_floating_point_v<T> || std::is_same_v<T, half> || std::is_same_v<T, bfloat>;
template <class T> inline constexpr bool is_scalar_v = std::is_arithmetic_v<T> || is_floating_point_v<T>;
template <class T> inline constexpr bool is_arithmetic_v = is_scalar_v<T>;
template <class T> struct is_floating_point : std::bool_constant<is_floating_point_v<T>> {};
template <class T> struct is_integral : std::is_integral<T> {};

template <class T, int N> struct vec;
template <class V> struct lanes_of { static constexpr int count = 1; };
template <class T, int N> struct lanes_of<vec<T, N>> { static constexpr int count = N; };

// Some lanes of a vector as the target of an assignment: `v.xy = a` becomes `v.template swizzle<0, 1>() = a`.
// Where they are only read, `v.xy` becomes `v.template lanes<0, 1>()`.
template <class V, class T, int... I> struct swizzled {
    V& whole;
    constexpr operator vec<T, sizeof...(I)>() const { return vec<T, sizeof...(I)>(whole[I]...); }
    template <class A> constexpr auto operator=(const A& given) const {
        vec<T, sizeof...(I)> value(given);
        int at = 0;
        ((whole[I] = value[at++]), ...);
        return value;
    }
    template <class A> constexpr auto operator+=(const A& a) const { return *this = vec<T, sizeof...(I)>(*this) + a; }
    template <class A> constexpr auto operator-=(const A& a) const { return *this = vec<T, sizeof...(I)>(*this) - a; }
    template <class A> constexpr auto operator*=(const A& a) const { return *this = vec<T, sizeof...(I)>(*this) * a; }
};

template <class D, class T, int N> struct vec_verbs {
    constexpr D& self() { return *static_cast<D*>(this); }
    constexpr T& operator[](int i) {
        if ((unsigned)i >= N) emu_fail("index-out-of-bounds", "a vector has no such lane", __builtin_source_location());
        return i == 0 ? self().x : i == 1 ? self().y : third(i);
    }
    constexpr T operator[](int i) const { return const_cast<vec_verbs&>(*this)[i]; }
    constexpr T& third(int i) {
        if constexpr (N == 4) return i == 2 ? self().z : self().w;
        else if constexpr (N == 3) return self().z;
        else return self().y;
    }
    template <int... I> constexpr swizzled<D, T, I...> swizzle() { return {self()}; }
    template <int... I> constexpr vec<T, sizeof...(I)> lanes() const { return vec<T, sizeof...(I)>((*this)[I]...); }
};

template <class T> struct alignas(2 * sizeof(T)) vec<T, 2> : vec_verbs<vec<T, 2>, T, 2> {
    T x, y;
    vec() = default;
    constexpr vec(T all) : x(all), y(all) {}
    template <class A, class B> constexpr vec(A a, B b) : x(T(a)), y(T(b)) {}
    template <class U> explicit constexpr vec(const vec<U, 2>& o) : x(T(o.x)), y(T(o.y)) {}
};

template <class T> struct alignas(4 * sizeof(T)) vec<T, 3> : vec_verbs<vec<T, 3>, T, 3> {
    T x, y, z;
    vec() = default;
    constexpr vec(T all) : x(all), y(all), z(all) {}
    template <class A, class B, class C> constexpr vec(A a, B b, C c) : x(T(a)), y(T(b)), z(T(c)) {}
    constexpr vec(vec<T, 2> a, T b) : x(a.x), y(a.y), z(b) {}
    template <class U> explicit constexpr vec(const vec<U, 3>& o) : x(T(o.x)), y(T(o.y)), z(T(o.z)) {}
};

template <class T> struct alignas(4 * sizeof(T)) vec<T, 4> : vec_verbs<vec<T, 4>, T, 4> {
    T x, y, z, w;
    vec() = default;
    constexpr vec(T all) : x(all), y(all), z(all), w(all) {}
    template <class A, class B, class C, class D>
    constexpr vec(A a, B b, C c, D d) : x(T(a)), y(T(b)), z(T(c)), w(T(d)) {}
    constexpr vec(vec<T, 2> a, vec<T, 2> b) : x(a.x), y(a.y), z(b.x), w(b.y) {}
    constexpr vec(vec<T, 2> a, T b, T c) : x(a.x), y(a.y), z(b), w(c) {}
    constexpr vec(vec<T, 3> a, T b) : x(a.x), y(a.y), z(a.z), w(b) {}
    template <class U> explicit constexpr vec(const vec<U, 4>& o) : x(T(o.x)), y(T(o.y)), z(T(o.z)), w(T(o.w)) {}
};

// Applies a function of lanes to vectors of one length.
template <class R, int N, class F> constexpr vec<R, N> by_lane(F f) {
    if constexpr (N == 2) return vec<R, 2>(f(0), f(1));
    else if constexpr (N == 3) return vec<R, 3>(f(0), f(1), f(2));
    else return vec<R, 4>(f(0), f(1), f(2), f(3));
}

#define EMU_VEC(op, R)                                                                                                   \
    template <class T, int N> constexpr vec<R, N> operator op(vec<T, N> a, vec<T, N> b) { return by_lane<R, N>([&](int i) { return R(a[i] op b[i]); }); } \
    template <class T, int N> constexpr vec<R, N> operator op(vec<T, N> a, std::type_identity_t<T> b) { return by_lane<R, N>([&](int i) { return R(a[i] op b); }); } \
    template <class T, int N> constexpr vec<R, N> operator op(std::type_identity_t<T> a, vec<T, N> b) { return by_lane<R, N>([&](int i) { return R(a op b[i]); }); }
#define EMU_VEC_SET(op)                                                                                                  \
    EMU_VEC(op, T)                                                                                                       \
    template <class T, int N, class B> constexpr vec<T, N>& operator op##=(vec<T, N>& a, const B& b) { return a = a op b; }
EMU_VEC_SET(+) EMU_VEC_SET(-) EMU_VEC_SET(*) EMU_VEC_SET(/) EMU_VEC_SET(%) EMU_VEC_SET(&) EMU_VEC_SET(|) EMU_VEC_SET(^)
EMU_VEC_SET(<<) EMU_VEC_SET(>>)
EMU_VEC(<, bool) EMU_VEC(>, bool) EMU_VEC(<=, bool) EMU_VEC(>=, bool) EMU_VEC(==, bool) EMU_VEC(!=, bool) EMU_VEC(&&, bool) EMU_VEC(||, bool)
template <class T, int N> constexpr vec<T, N> operator-(vec<T, N> a) { return by_lane<T, N>([&](int i) { return T(-a[i]); }); }
template <class T, int N> constexpr vec<T, N> operator~(vec<T, N> a) { return by_lane<T, N>([&](int i) { return T(~a[i]); }); }
template <int N> constexpr vec<bool, N> operator!(vec<bool, N> a) { return by_lane<bool, N>([&](int i) { return !a[i]; }); }

#define EMU_NAMES(T)                                                                                           \
    typedef vec<T, 2> T##2; typedef vec<T, 3> T##3; typedef vec<T, 4> T##4;
EMU_NAMES(bool) EMU_NAMES(char) EMU_NAMES(uchar) EMU_NAMES(short) EMU_NAMES(ushort) EMU_NAMES(int) EMU_NAMES(uint)
EMU_NAMES(long) EMU_NAMES(ulong) EMU_NAMES(half) EMU_NAMES(float) EMU_NAMES(bfloat)

// Vectors in memory without padding or alignment of their own.
template <class T, int N> struct packed_vec {
    T lane[N];
    packed_vec() = default;
    constexpr packed_vec(vec<T, N> v) { for (int i = 0; i < N; ++i) lane[i] = v[i]; }
    constexpr operator vec<T, N>() const { return by_lane<T, N>([&](int i) { return lane[i]; }); }
    constexpr T& operator[](int i) { return lane[i]; }
};
#define EMU_PACKED(T)                                                                                          \
    typedef packed_vec<T, 2> packed_##T##2; typedef packed_vec<T, 3> packed_##T##3; typedef packed_vec<T, 4> packed_##T##4;
EMU_PACKED(char) EMU_PACKED(uchar) EMU_PACKED(short) EMU_PACKED(ushort) EMU_PACKED(int) EMU_PACKED(uint) EMU_PACKED(half)
EMU_PACKED(float) EMU_PACKED(bfloat)

template <class To, class From> constexpr To as_type(From from) {
    static_assert(sizeof(To) == sizeof(From), "as_type needs types of one width");
    return __builtin_bit_cast(To, from);
}

template <class T> struct numeric_limits : std::numeric_limits<T> {};
template <> struct numeric_limits<half> {
    static constexpr half max() { return half(65504.0f); }
    static constexpr half lowest() { return half(-65504.0f); }
    static constexpr half min() { return half(6.103515625e-5f); }
    static constexpr half epsilon() { return half(0.0009765625f); }
    static constexpr half infinity() { return half(__builtin_inff()); }
    static constexpr half quiet_NaN() { return half(__builtin_nanf("")); }
};
template <> struct numeric_limits<bfloat> {
    static constexpr bfloat max() { return bfloat::from_bits(0x7f7f); }
    static constexpr bfloat lowest() { return bfloat::from_bits(0xff7f); }
    static constexpr bfloat min() { return bfloat::from_bits(0x0080); }
    static constexpr bfloat epsilon() { return bfloat::from_bits(0x3c00); }
    static constexpr bfloat infinity() { return bfloat::from_bits(0x7f80); }
    static constexpr bfloat quiet_NaN() { return bfloat::from_bits(0x7fc0); }
};

} // namespace metal
