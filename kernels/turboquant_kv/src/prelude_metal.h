// The small vocabulary in which every kernel here is written, for Metal. prelude_cuda.h is its twin.
// MLX includes the Metal standard library and its bfloat16_t before this text.
#pragma once
#define TQ_FN METAL_FUNC
#define TQ_DEVICE device
#define TQ_SHARED threadgroup
#define TQ_THREAD thread
#define TQ_SHARED_VARIABLE(type, name) threadgroup type name
#define TQ_BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup)
#define TQ_DEVICE_BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device)
#define TQ_WARP_BARRIER() simdgroup_barrier(mem_flags::mem_threadgroup)
#define TQ_TABLE constant
#define TQ_CONSTANT static constant constexpr const

typedef half Half;

TQ_FN float tq_lane_sum(float x) { return simd_sum(x); }
TQ_FN float tq_lane_max(float x) { return simd_max(x); }
TQ_FN float tq_shuffle(float x, uint lane) { return simd_shuffle(x, ushort(lane)); }
TQ_FN uint tq_shuffle(uint x, uint lane) { return simd_shuffle(x, ushort(lane)); }
TQ_FN float tq_shuffle_xor(float x, uint mask) { return simd_shuffle_xor(x, ushort(mask)); }
TQ_FN float tq_as_float(int bits) { return as_type<float>(bits); }
TQ_FN float tq_exp2(float x) { return exp2(x); }
TQ_FN float tq_sqrt(float x) { return sqrt(x); }
// Bits of x where mask has ones, of y elsewhere.
TQ_FN uint tq_select(uint mask, uint x, uint y) { return (x & mask) | (y & ~mask); }
TQ_FN float tq_max(float a, float b) { return a > b ? a : b; }
// Whether a row's neighbours lie side by side; eight are read one by one all the same (common.h).
template <typename T>
TQ_FN bool tq_is_wide(const device T*, int stride) { return stride == 1; }
