// What kernel bodies share, in CUDA's words. metal.h says the same in Metal's.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DEVICE
#define SHARED __shared__
#define THREAD
#define SHARED_POINTER(T) T*
#define CONSTANT constexpr
#define FUNC __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define BARRIER() __syncthreads()

// Metal's names for a thread's place; threadgroups are one-dimensional.
#define threadgroup_position_in_grid blockIdx
#define thread_index_in_threadgroup threadIdx.x
#define thread_index_in_simdgroup (threadIdx.x & 31u)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)

namespace quire {

CONSTANT unsigned ALL_LANES = 0xffffffffu;
CONSTANT int LOADS_UNDER_WAY = 4; // of a lane that copies to threadgroup memory

FUNC float as_float(int bits) { return __int_as_float(bits); }
FUNC float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FUNC float log2(float x) { return ::log2f(x); }
FUNC float tanh(float x) { return ::tanhf(x); }
FUNC float cos(float x) { return ::cosf(x); }
FUNC float sin(float x) { return ::sinf(x); }
FUNC float rsqrt(float x) { return ::rsqrtf(x); }
FUNC float shuffle(float x, int lane) { return __shfl_sync(ALL_LANES, x, lane); }
FUNC unsigned shuffle(unsigned x, int lane) { return __shfl_sync(ALL_LANES, x, lane); }
FUNC float shuffle_xor(float x, int mask) { return __shfl_xor_sync(ALL_LANES, x, mask); }
FUNC bool any(bool x) { return __any_sync(ALL_LANES, x); }

// The 32-bit words that values of type T come in.
template <typename T>
struct Word {
  static FUNC void unpack(unsigned word, float* out) { out[0] = __uint_as_float(word); }
  static FUNC unsigned pack(const float* in) { return __float_as_uint(in[0]); }
};
template <>
struct Word<__half> {
  static FUNC void unpack(unsigned word, float* out) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
    out[0] = pair.x;
    out[1] = pair.y;
  }
  static FUNC unsigned pack(const float* in) {
    const __half2 pair = __floats2half2_rn(in[0], in[1]);
    return *reinterpret_cast<const unsigned*>(&pair);
  }
};
template <>
struct Word<__nv_bfloat16> {
  static FUNC void unpack(unsigned word, float* out) {
    out[0] = __uint_as_float(word << 16);
    out[1] = __uint_as_float(word & 0xffff0000u);
  }
  static FUNC unsigned pack(const float* in) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(in[0], in[1]);
    return *reinterpret_cast<const unsigned*>(&pair);
  }
};

} // namespace quire
