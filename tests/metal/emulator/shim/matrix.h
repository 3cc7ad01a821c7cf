// simdgroup_matrix<T, 8, 8>: an 8x8 tile spread over 32 lanes, two neighbouring elements of one row in each.
// Owns the layout that MLX's own attention kernels rely on (steel/gemm/mma.h), loading, storing, multiplying.
#pragma once
#include "simd.h"

namespace metal {

struct emu_spot { uint row, column; };
// Where a lane's first element lies; the second is one column to the right.
constexpr emu_spot emu_spot_of(uint lane) {
    uint quad = lane / 4;
    return {(quad & 4) + (lane / 2) % 4, (quad & 2) * 2 + (lane % 2) * 2};
}
// The lane that holds an element; its position there is column % 2.
constexpr uint emu_lane_of(uint row, uint column) {
    return (row & 4) * 4 + (column & 4) * 2 + (row & 3) * 2 + (column & 2) / 2;
}

template <class T, int Cols, int Rows> struct simdgroup_matrix {
    static_assert(Cols == 8 && Rows == 8, "simdgroup matrices are 8x8");
    vec<T, 2> held;
    simdgroup_matrix() = default;
    constexpr explicit simdgroup_matrix(T diagonal) : held(T(0)) {
        emu_spot spot = emu_spot_of(emu_where()->lane);
        if (spot.row == spot.column) held.x = diagonal;
        if (spot.row == spot.column + 1) held.y = diagonal;
    }
    constexpr vec<T, 2>& thread_elements() { return held; }
    constexpr const vec<T, 2>& thread_elements() const { return held; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int C, int R> simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(std::type_identity_t<T> value) {
    simdgroup_matrix<T, C, R> made;
    made.held = vec<T, 2>(value);
    return made;
}

// All lanes must name one address and stride.
template <class P> EMU_HIDDEN inline void emu_same_tile(int op, P* at, ulong stride, const void* site) {
    struct tile { P* at; ulong stride; } mine{at, stride};
    gathered<tile> all(op, mine, site);
    if (all.active != ~0u) emu_fail("inactive-lane", "matrix operations need all 32 lanes", site);
    if (all.lane[0].at != at || all.lane[0].stride != stride) emu_fail("simd-divergence", "lanes name different tiles", site);
}

template <class T, class P>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& into, const P* at, ulong elements_per_row = 8, ulong2 origin = ulong2(0), bool transpose = false, EMU_SITE) {
    static_assert(std::is_same_v<T, P>, "simdgroup_load needs memory of the matrix's type");
    emu_same_tile(EMU_MATRIX_LOAD, at + origin.y * elements_per_row + origin.x, elements_per_row, site);
    emu_spot spot = emu_spot_of(emu_where()->lane);
    for (uint i = 0; i < 2; ++i) {
        ulong row = transpose ? spot.column + i : spot.row, column = transpose ? spot.row : spot.column + i;
        (i ? into.held.y : into.held.x) = at[(row + origin.y) * elements_per_row + column + origin.x];
    }
}
template <class T, class P>
inline void simdgroup_store(const simdgroup_matrix<T, 8, 8>& from, P* at, ulong elements_per_row = 8, ulong2 origin = ulong2(0), bool transpose = false, EMU_SITE) {
    static_assert(std::is_same_v<T, P>, "simdgroup_store needs memory of the matrix's type");
    emu_same_tile(EMU_MATRIX_STORE, at + origin.y * elements_per_row + origin.x, elements_per_row, site);
    emu_spot spot = emu_spot_of(emu_where()->lane);
    for (uint i = 0; i < 2; ++i) {
        ulong row = transpose ? spot.column + i : spot.row, column = transpose ? spot.row : spot.column + i;
        at[(row + origin.y) * elements_per_row + column + origin.x] = i ? from.held.y : from.held.x;
    }
}

struct emu_pair_of_tiles { float a[2], b[2]; };
template <class D, class A, class B, class C>
EMU_HIDDEN inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c, EMU_SITE) {
    emu_pair_of_tiles mine{{(float)a.held.x, (float)a.held.y}, {(float)b.held.x, (float)b.held.y}};
    gathered<emu_pair_of_tiles> all(EMU_MATRIX_MULTIPLY, mine, site);
    if (all.active != ~0u) emu_fail("inactive-lane", "matrix operations need all 32 lanes", site);
    emu_spot spot = emu_spot_of(all.me);
    float sum[2] = {(float)c.held.x, (float)c.held.y};
    for (uint k = 0; k < 8; ++k)
        for (uint i = 0; i < 2; ++i)
            sum[i] += all.lane[emu_lane_of(spot.row, k)].a[k % 2] * all.lane[emu_lane_of(k, spot.column + i)].b[i];
    d.held.x = D(sum[0]), d.held.y = D(sum[1]);
}
template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b, EMU_SITE) {
    simdgroup_matrix<D, 8, 8> zero;
    zero.held = vec<D, 2>(D(0));
    simdgroup_multiply_accumulate(d, a, b, zero, site);
}

} // namespace metal
