// What kernel bodies share, in Metal's words. cuda.h says the same in CUDA's.

// Apple's headers come before the macros: their words may be Apple's too.
#include <metal_simdgroup_matrix>

#define DEVICE device
#define SHARED threadgroup
#define THREAD thread
#define SHARED_POINTER(T) threadgroup T*
// Metal has no other address space for variables outside of functions.
#define CONSTANT constant constexpr
#define FUNC inline
#define UNROLL _Pragma("clang loop unroll(full)")
#define BARRIER() metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup)

namespace quire {

CONSTANT int LOADS_UNDER_WAY = 1; // of a lane that copies to threadgroup memory

FUNC float as_float(int bits) { return as_type<float>(bits); }
FUNC float exp2(float x) { return metal::fast::exp2(x); }
FUNC float log2(float x) { return metal::precise::log2(x); }
FUNC float tanh(float x) { return metal::precise::tanh(x); }
FUNC float cos(float x) { return metal::precise::cos(x); }
FUNC float sin(float x) { return metal::precise::sin(x); }
FUNC float rsqrt(float x) { return metal::precise::rsqrt(x); }
FUNC float shuffle(float x, int lane) { return metal::simd_shuffle(x, ushort(lane)); }
FUNC uint shuffle(uint x, int lane) { return metal::simd_shuffle(x, ushort(lane)); }
FUNC float shuffle_xor(float x, int mask) { return metal::simd_shuffle_xor(x, ushort(mask)); }
FUNC bool any(bool x) { return metal::simd_any(x); }

// The 32-bit words that values of type T come in.
template <typename T>
struct Word {
  static FUNC void unpack(uint word, THREAD float* out) { out[0] = as_type<float>(word); }
  static FUNC uint pack(THREAD const float* in) { return as_type<uint>(in[0]); }
};
template <>
struct Word<half> {
  static FUNC void unpack(uint word, THREAD float* out) {
    const half2 pair = as_type<half2>(word);
    out[0] = float(pair.x);
    out[1] = float(pair.y);
  }
  static FUNC uint pack(THREAD const float* in) {
    half2 pair;
    pair.x = half(in[0]);
    pair.y = half(in[1]);
    return as_type<uint>(pair);
  }
};
template <>
struct Word<bfloat16_t> {
  static FUNC void unpack(uint word, THREAD float* out) {
    out[0] = as_type<float>(word << 16);
    out[1] = as_type<float>(word & 0xffff0000u);
  }
  static FUNC uint pack(THREAD const float* in) {
    const uint low = as_type<uint>(float(bfloat16_t(in[0])));
    return (low >> 16) | as_type<uint>(float(bfloat16_t(in[1])));
  }
};

} // namespace quire
