// The small vocabulary in which every kernel here is written, for CUDA. prelude_metal.h is its twin.
#pragma once
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#define TQ_FN __device__ __forceinline__
#define TQ_DEVICE
#define TQ_SHARED
#define TQ_THREAD
#define TQ_SHARED_VARIABLE(type, name) __shared__ type name
#define TQ_BARRIER() __syncthreads()
#define TQ_DEVICE_BARRIER() __syncthreads()  // what a block wrote to device memory is then seen by all of it
#define TQ_WARP_BARRIER() __syncwarp()
#define TQ_TABLE __device__ const
#define TQ_CONSTANT constexpr
// TqPlace of common.h; Metal's threads are told where they stand by parameters of the kernel.
#define TQ_PLACE {threadIdx.x, threadIdx.x & 31, threadIdx.x >> 5, blockIdx.x, blockIdx.y, blockIdx.z, gridDim.x}

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __half Half;

TQ_FN float tq_shuffle(float x, uint lane) { return __shfl_sync(~0u, x, lane); }
TQ_FN uint tq_shuffle(uint x, uint lane) { return __shfl_sync(~0u, x, lane); }
TQ_FN float tq_lane_sum(float x) {
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
TQ_FN float tq_lane_max(float x) {
  for (int step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}
TQ_FN float tq_shuffle_xor(float x, uint mask) { return __shfl_xor_sync(~0u, x, mask); }
TQ_FN float tq_as_float(int bits) { return __int_as_float(bits); }
TQ_FN float tq_sqrt(float x) { return sqrtf(x); }
TQ_FN float tq_max(float a, float b) { return fmaxf(a, b); }

// 16-bit exact values, eight at a time; a row begins at a multiple of 16 bytes.
TQ_FN void tq_load8(const __half* p, float* out) {
  const uint4 x = *reinterpret_cast<const uint4*>(p);
  const __half2* pairs = reinterpret_cast<const __half2*>(&x);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = __half22float2(pairs[i]);
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}
TQ_FN void tq_load8(const __nv_bfloat16* p, float* out) {
  const uint4 x = *reinterpret_cast<const uint4*>(p);
  const uint words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
TQ_FN void tq_load8(const float* p, float* out) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint4 x = reinterpret_cast<const uint4*>(p)[i];
    out[4 * i] = __uint_as_float(x.x);
    out[4 * i + 1] = __uint_as_float(x.y);
    out[4 * i + 2] = __uint_as_float(x.z);
    out[4 * i + 3] = __uint_as_float(x.w);
  }
}

// The inverses.
template <typename Pair>
TQ_FN uint tq_word_of(Pair x) { return *reinterpret_cast<const uint*>(&x); }
TQ_FN void tq_store8(__half* p, const float* x) {
  *reinterpret_cast<uint4*>(p) =
      make_uint4(tq_word_of(__floats2half2_rn(x[0], x[1])), tq_word_of(__floats2half2_rn(x[2], x[3])),
                 tq_word_of(__floats2half2_rn(x[4], x[5])), tq_word_of(__floats2half2_rn(x[6], x[7])));
}
TQ_FN void tq_store8(__nv_bfloat16* p, const float* x) {
  *reinterpret_cast<uint4*>(p) =
      make_uint4(tq_word_of(__floats2bfloat162_rn(x[0], x[1])), tq_word_of(__floats2bfloat162_rn(x[2], x[3])),
                 tq_word_of(__floats2bfloat162_rn(x[4], x[5])), tq_word_of(__floats2bfloat162_rn(x[6], x[7])));
}
TQ_FN void tq_store8(float* p, const float* x) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    *reinterpret_cast<uint4*>(p + i) =
        make_uint4(tq_word_of(x[i]), tq_word_of(x[i + 1]), tq_word_of(x[i + 2]), tq_word_of(x[i + 3]));
  }
}

// Whether eight neighbours of a row can be read at once.
template <typename T>
TQ_FN bool tq_is_wide(const T* row, int stride) { return stride == 1 && (ulong(row) & 15) == 0; }

// Dynamic shared memory; backends/gpu/arena.py says what lies where.
TQ_FN uchar* tq_arena() {
  extern __shared__ __align__(128) uchar arena[];
  return arena;
}
