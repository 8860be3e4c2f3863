// Weights of MLX's mode mxfp4, in Metal's words; stands after quantized_fragments. cuda_fp4_fragments.h
// says the same in CUDA's.

namespace quire {

template <typename T>
struct Fp4Fragments : Fragments<T, 4> {
  typedef Fragments<T, 4> Base;
  enum { HAS_BIAS = 0 };
  typedef uchar Scale; // the exponent of a power of two
  static FUNC float scale(uchar stored) {
    return as_type<float>(stored == 0 ? 0x00400000u : uint(stored) << 23);
  }

  static FUNC typename Base::Weights weights(uint upper, uint lower) {
    typename Base::Weights result;
    UNROLL
    for (int e = 0; e < 8; ++e) {
      result.values[0][e] = value(upper >> (4 * e));
      result.values[1][e] = value(lower >> (4 * e));
    }
    return result;
  }

  // Of a code's lowest four bits: sign, two of the exponent, one of the mantissa.
  static FUNC float value(uint code) {
    const uint size = code & 7u;
    const float found =
        size < 2u ? 0.5f * float(size) : as_type<float>(((size >> 1) + 126u) << 23 | (size & 1u) << 22);
    return (code & 8u) != 0u ? -found : found;
  }
};

} // namespace quire
