// Declarations of Metal's library for clang's type checker only: nothing here is ever run.
// Owns address spaces as clang attributes, so that mixing them is an error as it is in Metal. `thread` is clang's own
// address space; a pointer without any is refused before, in rewrite.py.
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
typedef unsigned char uchar; typedef unsigned short ushort; typedef unsigned int uint; typedef unsigned long ulong;
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long int64_t;
typedef uchar uint8_t; typedef ushort uint16_t; typedef uint uint32_t; typedef ulong uint64_t;
typedef unsigned long size_t; typedef long ptrdiff_t;
typedef _Float16 half; typedef half float16_t; typedef __bf16 bfloat; typedef bfloat bfloat16_t;

namespace metal {
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
template <class T> struct emu_lane_type { typedef T type; };
template <class T, int N> struct emu_lane_type<T __attribute__((ext_vector_type(N)))> { typedef T type; };
template <class T> using emu_lane = typename emu_lane_type<T>::type;
template <class T> struct emu_same { typedef T type; };
template <class T> using emu_t = typename emu_same<T>::type;
template <class V, class... A> V emu_make(A...);
template <class T> T& emu_variable();
#define EMU_NAMES(T) typedef vec<T, 2> T##2; typedef vec<T, 3> T##3; typedef vec<T, 4> T##4;
EMU_NAMES(bool) EMU_NAMES(char) EMU_NAMES(uchar) EMU_NAMES(short) EMU_NAMES(ushort) EMU_NAMES(int) EMU_NAMES(uint)
EMU_NAMES(long) EMU_NAMES(ulong) EMU_NAMES(half) EMU_NAMES(float)

template <bool B, class T, class F> struct conditional { typedef T type; };
template <class T, class F> struct conditional<false, T, F> { typedef F type; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <class A, class B> constexpr bool is_same_v = __is_same(A, B);
template <class T> constexpr bool is_integral_v = __is_integral(T);
template <class T> constexpr bool is_floating_point_v = __is_floating_point(T) || __is_same(T, half) || __is_same(T, bfloat);
template <class T> struct numeric_limits {
    static constexpr T max(); static constexpr T min(); static constexpr T lowest(); static constexpr T infinity();
    static constexpr T epsilon(); static constexpr T quiet_NaN();
};

#define EMU_MATHS                                                                                              \
    template <class T> T exp(T); template <class T> T exp2(T); template <class T> T exp10(T);                  \
    template <class T> T log(T); template <class T> T log2(T); template <class T> T log10(T);                  \
    template <class T> T sqrt(T); template <class T> T rsqrt(T); template <class T> T sin(T); template <class T> T cos(T); \
    template <class T> T tan(T); template <class T> T tanh(T); template <class T> T floor(T); template <class T> T ceil(T); \
    template <class T> T trunc(T); template <class T> T round(T); template <class T> T rint(T); template <class T> T fract(T); \
    template <class T> T fabs(T); template <class T> T abs(T); template <class T> T sign(T);                   \
    template <class T> constexpr T min(T, T); template <class T> constexpr T max(T, T); template <class T> T pow(T, T); \
    template <class T> T fmin(T, T); template <class T> T fmax(T, T); template <class T> T fmod(T, T);         \
    template <class T> T copysign(T, T); template <class T> T clamp(T, emu_t<T>, emu_t<T>);
EMU_MATHS
namespace fast { EMU_MATHS }
namespace precise { EMU_MATHS }
template <class T> T fma(T, T, T);
template <class T> T mix(T, T, T);
template <class T> T max3(T, T, T);
template <class T> T min3(T, T, T);
template <class T> T ldexp(T, int);
template <class V> emu_lane<V> dot(V, V);
template <class V> emu_lane<V> length(V);
template <class T> bool isnan(T);
template <class T> bool isinf(T);
template <class T> bool isfinite(T);
template <class T, class B> T select(T, T, B);
template <class V> bool any(V);
template <class V> bool all(V);
template <class T> T popcount(T);
template <class T> T clz(T);
template <class T> T ctz(T);
template <class T> T mulhi(T, T);
template <class T> T mul24(T, T);
template <class T> T mad24(T, T, T);
template <class T> T rotate(T, T);
template <class T> T extract_bits(T, uint, uint);
template <class T> T insert_bits(T, T, uint, uint);
template <class T> T reverse_bits(T);
template <class To, class From> constexpr To as_type(From from) { return __builtin_bit_cast(To, from); }
float4 unpack_unorm4x8_to_float(uint);

enum class mem_flags : int { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags((int)a | (int)b); }
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
template <class T> T simd_sum(T); template <class T> T simd_product(T); template <class T> T simd_max(T);
template <class T> T simd_min(T); template <class T> T simd_and(T); template <class T> T simd_or(T); template <class T> T simd_xor(T);
template <class T> T simd_prefix_inclusive_sum(T); template <class T> T simd_prefix_exclusive_sum(T);
template <class T> T simd_prefix_inclusive_product(T); template <class T> T simd_prefix_exclusive_product(T);
template <class T> T simd_shuffle(T, ushort); template <class T> T simd_shuffle_xor(T, ushort);
template <class T> T simd_shuffle_up(T, ushort); template <class T> T simd_shuffle_down(T, ushort);
template <class T> T simd_shuffle_rotate_up(T, ushort); template <class T> T simd_shuffle_rotate_down(T, ushort);
template <class T> T simd_broadcast(T, ushort); template <class T> T simd_broadcast_first(T);
template <class T> T quad_shuffle_xor(T, ushort); template <class T> T quad_sum(T);
struct simd_vote { explicit operator uint64_t() const; bool any() const; };
simd_vote simd_ballot(bool); simd_vote simd_active_threads_mask();
bool simd_any(bool); bool simd_all(bool); bool simd_is_first();

enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T value; };
typedef atomic<int> atomic_int; typedef atomic<uint> atomic_uint; typedef atomic<bool> atomic_bool; typedef atomic<float> atomic_float;
#define EMU_ATOMICS(space)                                                                                     \
    template <class T> T atomic_fetch_add_explicit(space atomic<T>*, emu_t<T>, memory_order);                  \
    template <class T> T atomic_fetch_sub_explicit(space atomic<T>*, emu_t<T>, memory_order);                  \
    template <class T> T atomic_fetch_min_explicit(space atomic<T>*, emu_t<T>, memory_order);                  \
    template <class T> T atomic_fetch_max_explicit(space atomic<T>*, emu_t<T>, memory_order);                  \
    template <class T> T atomic_fetch_and_explicit(space atomic<T>*, emu_t<T>, memory_order);                  \
    template <class T> T atomic_fetch_or_explicit(space atomic<T>*, emu_t<T>, memory_order);                   \
    template <class T> T atomic_fetch_xor_explicit(space atomic<T>*, emu_t<T>, memory_order);                  \
    template <class T> T atomic_load_explicit(const space atomic<T>*, memory_order);                           \
    template <class T> void atomic_store_explicit(space atomic<T>*, emu_t<T>, memory_order);                   \
    template <class T> T atomic_exchange_explicit(space atomic<T>*, emu_t<T>, memory_order);                   \
    template <class T> bool atomic_compare_exchange_weak_explicit(space atomic<T>*, T*, emu_t<T>, memory_order, memory_order);
EMU_ATOMICS(device) EMU_ATOMICS(threadgroup)

template <class T, int C, int R> struct simdgroup_matrix {
    simdgroup_matrix(); explicit simdgroup_matrix(T);
    vec<T, 2>& thread_elements(); const vec<T, 2>& thread_elements() const;
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8; typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int C, int R> simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(emu_t<T>);
#define EMU_TILES(space)                                                                                       \
    template <class T> void simdgroup_load(simdgroup_matrix<T, 8, 8>&, const space T*, ulong = 8, ulong2 = 0, bool = false); \
    template <class T> void simdgroup_store(const simdgroup_matrix<T, 8, 8>&, space T*, ulong = 8, ulong2 = 0, bool = false);
EMU_TILES(device) EMU_TILES(threadgroup)
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>, simdgroup_matrix<C, 8, 8>);
template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>);
} // namespace metal
using namespace metal;

// Vectors are made by a call with several values, which plain C++ has for classes only.
#define float2(...) emu_make<float2>(__VA_ARGS__)
#define float3(...) emu_make<float3>(__VA_ARGS__)
#define float4(...) emu_make<float4>(__VA_ARGS__)
#define half2(...) emu_make<half2>(__VA_ARGS__)
#define half3(...) emu_make<half3>(__VA_ARGS__)
#define half4(...) emu_make<half4>(__VA_ARGS__)
#define int2(...) emu_make<int2>(__VA_ARGS__)
#define int3(...) emu_make<int3>(__VA_ARGS__)
#define int4(...) emu_make<int4>(__VA_ARGS__)
#define uint2(...) emu_make<uint2>(__VA_ARGS__)
#define uint3(...) emu_make<uint3>(__VA_ARGS__)
#define uint4(...) emu_make<uint4>(__VA_ARGS__)
#define uchar4(...) emu_make<uchar4>(__VA_ARGS__)
#define ushort2(...) emu_make<ushort2>(__VA_ARGS__)
#define ushort4(...) emu_make<ushort4>(__VA_ARGS__)
#define ulong2(...) emu_make<ulong2>(__VA_ARGS__)
#define METAL_FUNC inline __attribute__((__always_inline__))
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define HALF_MAX half(65504.0f)
#define MAXHALF half(65504.0f)
#define INT_MAX 2147483647
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
