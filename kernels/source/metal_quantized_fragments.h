// Products of quantised weights and rows of x by matrix units, in Metal's words; stands after
// metal_fragments.h. cuda_quantized_fragments.h says the same in CUDA's.

namespace quire {

template <typename T, int BITS>
struct Fragments {
  static constant constexpr int VALUES = 32 / BITS;
  static constant constexpr float OFFSET = 0.0f; // of every weight
  enum { HAS_BIAS = 1 }; // of a quantisation group
  typedef T Scale;
  static FUNC float scale(T stored) { return float(stored); }

  // A word of weights of each of the rows r and r + 8.
  struct Weights {
    float values[2][VALUES];
  };
  static FUNC Weights weights(uint upper, uint lower) {
    Weights result;
    UNROLL
    for (int e = 0; e < VALUES; ++e) {
      result.values[0][e] = float((upper >> (e * BITS)) & ((1u << BITS) - 1));
      result.values[1][e] = float((lower >> (e * BITS)) & ((1u << BITS) - 1));
    }
    return result;
  }

  // Which of eight rows of x a lane takes.
  enum { LANE_ROWS = 2 };
  static FUNC int lane_row(int lane, int i) { return 2 * fragment_place(lane) + i; }

  // What the lane's rows have for one word of weights: the place's words begin `step` values after
  // another. The lanes of fragment row r hold half r % 2 of the word of place r / 2.
  struct Inputs {
    float values[2][VALUES / 2];
  };
  static FUNC Inputs inputs(const DEVICE T* x, const THREAD int* rows, int depth, int k, int step, int lane) {
    const int slot = fragment_row(lane);
    const int at = k + slot / 2 * step + slot % 2 * (VALUES / 2);
    Inputs result;
    UNROLL
    for (int i = 0; i < 2; ++i) {
      const Packed<T, VALUES / 2> loaded =
          *(const DEVICE Packed<T, VALUES / 2>*)(x + size_t(rows[i]) * depth + at);
      UNROLL
      for (int e = 0; e < VALUES / 2; ++e) result.values[i][e] = float(loaded.values[e]);
    }
    return result;
  }

  // Adds to rows r (first two) and r + 8 (last two), columns 2 * place and 2 * place + 1.
  static FUNC void multiply(THREAD float* sums, const THREAD Weights& w, const THREAD Inputs& x) {
    UNROLL
    for (int e = 0; e < VALUES / 2; ++e) {
      multiply_8x8(sums, w.values[0][e], w.values[0][e + VALUES / 2], x.values[0][e], x.values[1][e]);
      multiply_8x8(sums + 2, w.values[1][e], w.values[1][e + VALUES / 2], x.values[0][e], x.values[1][e]);
    }
  }

  // The same with weights of one.
  static FUNC void add(THREAD float* sums, const THREAD Inputs& x) {
    UNROLL
    for (int e = 0; e < VALUES / 2; ++e) multiply_8x8(sums, 1.0f, 1.0f, x.values[0][e], x.values[1][e]);
    sums[2] = sums[0];
    sums[3] = sums[1];
  }
};

} // namespace quire
