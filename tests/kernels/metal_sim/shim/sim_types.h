// Metal's scalar and vector types.
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

namespace metal {

template <typename To, typename From>
inline To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  To y;
  std::memcpy(static_cast<void*>(&y), &x, sizeof(To));
  return y;
}

// Each rounds to nearest, ties to even.
struct HalfFormat {
  static float widen(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
    const uint32_t rest = bits & 0x7fffu;
    if (rest >= 0x7c00u) return as_type<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
    // 2^112 corrects the exponent, for subnormal numbers too.
    const float magnitude = as_type<float>(rest << 13) * as_type<float>(0x77800000u);
    return as_type<float>(as_type<uint32_t>(magnitude) | sign);
  }
  static uint16_t narrow(float x) {
    const uint32_t bits = as_type<uint32_t>(x);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    const uint32_t rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00u); // 65520 and above
    if (rest < 0x38800000u) {
      // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low mantissa bits.
      const float shifted = as_type<float>(rest) + 0.5f;
      return uint16_t(sign | (as_type<uint32_t>(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = rest + 0xfffu + ((rest >> 13) & 1u);
    return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
  }
};

struct BfloatFormat {
  static float widen(uint16_t bits) { return as_type<float>(uint32_t(bits) << 16); }
  static uint16_t narrow(float x) {
    const uint32_t bits = as_type<uint32_t>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

// A 16-bit float. Operations on two of them round to 16 bits; with any other type they are float.
template <typename Format>
struct Float16 {
  uint16_t bits;
  Float16() = default;
  template <typename N, typename = std::enable_if_t<std::is_arithmetic<N>::value>>
  Float16(N x) : bits(Format::narrow(float(x))) {}
  operator float() const { return Format::widen(bits); }
  Float16& operator+=(float x) { return *this = Float16(float(*this) + x); }
  Float16& operator-=(float x) { return *this = Float16(float(*this) - x); }
  Float16& operator*=(float x) { return *this = Float16(float(*this) * x); }
  Float16& operator/=(float x) { return *this = Float16(float(*this) / x); }
};

template <typename F>
inline Float16<F> operator+(Float16<F> a, Float16<F> b) { return float(a) + float(b); }
template <typename F>
inline Float16<F> operator-(Float16<F> a, Float16<F> b) { return float(a) - float(b); }
template <typename F>
inline Float16<F> operator*(Float16<F> a, Float16<F> b) { return float(a) * float(b); }
template <typename F>
inline Float16<F> operator/(Float16<F> a, Float16<F> b) { return float(a) / float(b); }

template <typename T>
struct alignas(2 * sizeof(T)) vec2 {
  T x, y;
  vec2() = default;
  vec2(T x, T y) : x(x), y(y) {}
};
template <typename T>
struct alignas(4 * sizeof(T)) vec3 {
  T x, y, z;
  vec3() = default;
  vec3(T x, T y, T z) : x(x), y(y), z(z) {}
};
template <typename T>
struct alignas(4 * sizeof(T)) vec4 {
  T x, y, z, w;
  vec4() = default;
  vec4(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
};

template <typename T>
using numeric_limits = std::numeric_limits<T>;

} // namespace metal

typedef metal::Float16<metal::HalfFormat> half;
typedef metal::Float16<metal::BfloatFormat> bfloat;
typedef metal::vec2<float> float2;
typedef metal::vec3<float> float3;
typedef metal::vec4<float> float4;
typedef metal::vec2<int> int2;
typedef metal::vec4<int> int4;
typedef metal::vec2<uint> uint2;
typedef metal::vec3<uint> uint3;
typedef metal::vec4<uint> uint4;
typedef metal::vec2<half> half2;
typedef metal::vec4<half> half4;
