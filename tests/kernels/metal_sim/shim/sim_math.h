// The mathematical functions of metal_stdlib that kernels use.
#pragma once

namespace metal {

#define METAL_SIM_UNARY(name, expression) \
  inline float name(float x) { return expression; }
#define METAL_SIM_FUNCTIONS                                    \
  METAL_SIM_UNARY(exp, std::exp(x))                            \
  METAL_SIM_UNARY(exp2, std::exp2(x))                          \
  METAL_SIM_UNARY(log, std::log(x))                            \
  METAL_SIM_UNARY(log2, std::log2(x))                          \
  METAL_SIM_UNARY(sin, std::sin(x))                            \
  METAL_SIM_UNARY(cos, std::cos(x))                            \
  METAL_SIM_UNARY(tanh, std::tanh(x))                          \
  METAL_SIM_UNARY(sqrt, std::sqrt(x))                          \
  METAL_SIM_UNARY(rsqrt, 1.0f / std::sqrt(x))                  \
  inline float pow(float x, float y) { return std::pow(x, y); } \
  inline float divide(float x, float y) { return x / y; }

METAL_SIM_FUNCTIONS
namespace precise { METAL_SIM_FUNCTIONS }
namespace fast { METAL_SIM_FUNCTIONS }

METAL_SIM_UNARY(floor, std::floor(x))
METAL_SIM_UNARY(ceil, std::ceil(x))
METAL_SIM_UNARY(round, std::round(x))
METAL_SIM_UNARY(rint, std::rint(x))
METAL_SIM_UNARY(trunc, std::trunc(x))
METAL_SIM_UNARY(fabs, std::fabs(x))
inline bool isnan(float x) { return std::isnan(x); }
inline bool isinf(float x) { return std::isinf(x); }
inline bool isfinite(float x) { return std::isfinite(x); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
#undef METAL_SIM_FUNCTIONS
#undef METAL_SIM_UNARY

// One overload a type and no template, as in Metal: mixed arguments are ambiguous there too.
#define METAL_SIM_ORDERED(T)                        \
  inline T min(T a, T b) { return b < a ? b : a; }  \
  inline T max(T a, T b) { return a < b ? b : a; }  \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); }
METAL_SIM_ORDERED(int)
METAL_SIM_ORDERED(uint)
METAL_SIM_ORDERED(short)
METAL_SIM_ORDERED(ushort)
METAL_SIM_ORDERED(long)
METAL_SIM_ORDERED(ulong)
#undef METAL_SIM_ORDERED
// Of a number and a NaN, the number.
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline float clamp(float x, float low, float high) { return min(max(x, low), high); }
inline half min(half a, half b) { return min(float(a), float(b)); }
inline half max(half a, half b) { return max(float(a), float(b)); }
inline bfloat min(bfloat a, bfloat b) { return min(float(a), float(b)); }
inline bfloat max(bfloat a, bfloat b) { return max(float(a), float(b)); }

inline int abs(int x) { return x < 0 ? -x : x; }
inline float abs(float x) { return std::fabs(x); }

template <typename T>
inline T select(T a, T b, bool condition) { return condition ? b : a; }

inline uint popcount(uint x) { return uint(__builtin_popcount(x)); }
inline uint clz(uint x) { return x == 0 ? 32 : uint(__builtin_clz(x)); }
inline uint ctz(uint x) { return x == 0 ? 32 : uint(__builtin_ctz(x)); }
inline uint reverse_bits(uint x) {
  uint y = 0;
  for (int bit = 0; bit < 32; ++bit) y |= ((x >> bit) & 1u) << (31 - bit);
  return y;
}
inline uint mulhi(uint a, uint b) { return uint((uint64_t(a) * b) >> 32); }
inline int mulhi(int a, int b) { return int((int64_t(a) * b) >> 32); }

} // namespace metal
