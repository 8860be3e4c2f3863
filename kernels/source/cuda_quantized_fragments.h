// Products of quantised weights and rows of x by matrix units, in CUDA's words; stands after
// cuda_fragments.h. metal_quantized_fragments.h says the same in Metal's.

namespace quire {

// Two 16-bit values in a word. `pair` makes them of values i and i + VALUES / 2 of four-bit weights,
// or 2 * i and 2 * i + 1 of eight-bit ones, each with `offset` added.
template <typename T>
struct Codes;

template <>
struct Codes<__half> {
  static constexpr unsigned ONES = 0x3c003c00u;
  static constexpr float offset(int) { return 1024.0f; }
  template <int BITS>
  static FUNC unsigned pair(unsigned word, int i) {
    // Below the mantissa of 1024 a bit is worth one.
    if (BITS == 4) return ((word >> (4 * i)) & 0x000f000fu) | 0x64006400u;
    return __byte_perm(word, 0x64646464u, i == 0 ? 0x4140 : 0x4342);
  }
};

template <>
struct Codes<__nv_bfloat16> {
  static constexpr unsigned ONES = 0x3f803f80u;
  static constexpr float offset(int bits) { return bits == 4 ? 128.0f : 0.0f; }
  template <int BITS>
  static FUNC unsigned pair(unsigned word, int i) {
    if (BITS == 4) return ((word >> (4 * i)) & 0x000f000fu) | 0x43004300u;
    // Up to 256 the upper half of a float is the whole value.
    const float low = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + 2 * i)) - 8388608.0f;
    const float high = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7441 + 2 * i)) - 8388608.0f;
    return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
  }
};

template <typename T, int BITS>
struct Fragments {
  static constexpr int VALUES = 32 / BITS;
  static constexpr float OFFSET = Codes<T>::offset(BITS); // of every weight
  enum { HAS_BIAS = 1 }; // of a quantisation group
  typedef T Scale;
  static FUNC float scale(T stored) { return float(stored); }

  // A word of weights of each of the rows r and r + 8.
  struct Weights {
    unsigned pairs[VALUES / 2][2];
  };
  static FUNC Weights weights(unsigned upper, unsigned lower) {
    Weights result;
    UNROLL
    for (int i = 0; i < VALUES / 2; ++i) {
      result.pairs[i][0] = Codes<T>::template pair<BITS>(upper, i);
      result.pairs[i][1] = Codes<T>::template pair<BITS>(lower, i);
    }
    return result;
  }

  // Which of eight rows of x a lane takes.
  enum { LANE_ROWS = 1 };
  static FUNC int lane_row(int lane, int) { return fragment_row(lane); }

  // What the lane's row has for one word of weights: the place's words begin `step` values after
  // another.
  struct Inputs {
    unsigned pairs[VALUES / 2];
  };
  static FUNC Inputs inputs(const T* x, const int* rows, int depth, int k, int step, int lane) {
    const Packed<unsigned, VALUES / 2> loaded = *reinterpret_cast<const Packed<unsigned, VALUES / 2>*>(
        x + size_t(rows[0]) * depth + k + fragment_place(lane) * step);
    Inputs result;
    UNROLL
    for (int i = 0; i < VALUES / 2; ++i) {
      result.pairs[i] = BITS == 8
          ? loaded.values[i]
          : __byte_perm(loaded.values[i / 2], loaded.values[i / 2 + VALUES / 4], i % 2 == 0 ? 0x5410 : 0x7632);
    }
    return result;
  }

  // Adds to rows r (first two) and r + 8 (last two), columns 2 * place and 2 * place + 1.
  static FUNC void multiply(float* sums, const Weights& w, const Inputs& x) {
    UNROLL
    for (int i = 0; i < VALUES / 2; i += 2) {
      Pairs<T>::multiply(
          sums, w.pairs[i][0], w.pairs[i][1], w.pairs[i + 1][0], w.pairs[i + 1][1], x.pairs[i], x.pairs[i + 1]);
    }
  }

  // The same with weights of one.
  static FUNC void add(float* sums, const Inputs& x) {
    constexpr unsigned ONES = Codes<T>::ONES;
    UNROLL
    for (int i = 0; i < VALUES / 2; i += 2) {
      Pairs<T>::multiply(sums, ONES, ONES, ONES, ONES, x.pairs[i], x.pairs[i + 1]);
    }
  }
};

} // namespace quire
