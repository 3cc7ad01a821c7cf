// What stands before every rewritten kernel: Metal's library, MLX's names, and the thread attributes as functions.
#pragma once
#include "matrix.h"

namespace metal {
EMU_HIDDEN inline uint3 emu_three(const uint32_t* from) { return uint3(from[0], from[1], from[2]); }
#define EMU_ATTRIBUTE(type, name, expression)                                                                  \
    EMU_HIDDEN inline type emu_##name(const emu_place& p) { return expression; }
EMU_ATTRIBUTE(uint, dispatch_quadgroups_per_threadgroup, p.num_full_simdgroups * 8)
EMU_ATTRIBUTE(uint, dispatch_simdgroups_per_threadgroup, p.num_full_simdgroups)
EMU_ATTRIBUTE(uint3, dispatch_threads_per_threadgroup, emu_three(p.full_group_threads))
EMU_ATTRIBUTE(uint3, grid_origin, uint3(0))
EMU_ATTRIBUTE(uint3, grid_size, emu_three(p.grid))
EMU_ATTRIBUTE(uint, quadgroup_index_in_threadgroup, p.flat / 4)
EMU_ATTRIBUTE(uint, quadgroups_per_threadgroup, p.num_simdgroups * 8)
EMU_ATTRIBUTE(uint, simdgroup_index_in_threadgroup, p.simdgroup)
EMU_ATTRIBUTE(uint, simdgroups_per_threadgroup, p.num_simdgroups)
EMU_ATTRIBUTE(uint, thread_execution_width, 32)
EMU_ATTRIBUTE(uint, thread_index_in_quadgroup, p.flat % 4)
EMU_ATTRIBUTE(uint, thread_index_in_simdgroup, p.lane)
EMU_ATTRIBUTE(uint, thread_index_in_threadgroup, p.flat)
EMU_ATTRIBUTE(uint3, thread_position_in_grid, emu_three(p.group) * emu_three(p.full_group_threads) + emu_three(p.local))
EMU_ATTRIBUTE(uint3, thread_position_in_threadgroup, emu_three(p.local))
EMU_ATTRIBUTE(uint3, threadgroup_position_in_grid, emu_three(p.group))
EMU_ATTRIBUTE(uint3, threadgroups_per_grid, emu_three(p.groups))
EMU_ATTRIBUTE(uint3, threads_per_grid, emu_three(p.grid))
EMU_ATTRIBUTE(uint, threads_per_simdgroup, 32)
EMU_ATTRIBUTE(uint3, threads_per_threadgroup, emu_three(p.group_threads))
} // namespace metal

using namespace metal;
#define METAL_FUNC inline __attribute__((__always_inline__))
