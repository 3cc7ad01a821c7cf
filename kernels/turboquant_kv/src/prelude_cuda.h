// The small vocabulary in which every kernel here is written, for CUDA. prelude_metal.h is its twin.
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#define TQ_FN __device__ __forceinline__
#define TQ_DEVICE
#define TQ_SHARED
#define TQ_THREAD
#define TQ_SHARED_ARRAY(type, name, count) __shared__ type name[count]
#define TQ_BARRIER() __syncthreads()
#define TQ_TABLE __device__ const

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

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
