// Weights of MLX's mode mxfp4, in CUDA's words; stands after quantized_fragments. metal_fp4_fragments.h
// says the same in Metal's.

namespace quire {

// The bytes of the values 0, 0.5, 1, 1.5, 2, 3, 4 and 6, four in a word: of a code's lower three bits.
template <typename T>
struct Fp4Bytes;

template <>
struct Fp4Bytes<__half> {
  enum : unsigned { UPPER_0 = 0x3e3c3800u, UPPER_4 = 0x46444240u, LOWER_0 = 0, LOWER_4 = 0 };
};

template <>
struct Fp4Bytes<__nv_bfloat16> {
  enum : unsigned { UPPER_0 = 0x3f3f3f00u, UPPER_4 = 0x40404040u, LOWER_0 = 0xc0800000u, LOWER_4 = 0xc0804000u };
};

template <typename T>
struct Fp4Fragments : Fragments<T, 4> {
  typedef Fragments<T, 4> Base;
  enum { HAS_BIAS = 0 };
  typedef unsigned char Scale; // the exponent of a power of two
  static FUNC float scale(unsigned char stored) {
    return __uint_as_float(stored == 0 ? 0x00400000u : unsigned(stored) << 23);
  }

  static FUNC typename Base::Weights weights(unsigned upper, unsigned lower) {
    typename Base::Weights result;
    UNROLL
    for (int i = 0; i < Base::VALUES / 2; ++i) {
      result.pairs[i][0] = pair(upper, i);
      result.pairs[i][1] = pair(lower, i);
    }
    return result;
  }

  // The values of codes i and i + 4. Byte 0 of either table is 0, for the bytes that it does not fill.
  static FUNC unsigned pair(unsigned word, int i) {
    typedef Fp4Bytes<T> Bytes;
    const unsigned codes = word >> (4 * i), index = codes & 0x00070007u;
    const unsigned upper = __byte_perm(Bytes::UPPER_0, Bytes::UPPER_4, (index << 4 | index >> 4) & 0x7070u);
    const unsigned lower = __byte_perm(Bytes::LOWER_0, Bytes::LOWER_4, (index | index >> 8) & 0x0707u);
    return upper | lower | (codes & 0x00080008u) << 12;
  }
};

} // namespace quire
