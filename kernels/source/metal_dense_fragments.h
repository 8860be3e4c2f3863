// Products of 16-bit weights and rows of x by matrix units, in Metal's words; stands after
// metal_fragments.h. cuda_dense_fragments.h says the same in CUDA's.

namespace quire {

// What is read once and by nobody else.
FUNC Pack load_once(const DEVICE Pack* from) { return *from; }

template <typename T>
struct DenseFragments {
  // What eight rows of x have for a pack of weights of every lane: packs of a row's places follow
  // each other from value k on. Beyond the last of `rows`, that one is read again. The lanes of row r
  // hold half r % 2 of place r / 2, for x's rows 2 * place and 2 * place + 1.
  struct Inputs {
    Packed<T, 4> halves[2];
  };
  static FUNC Inputs inputs(const DEVICE T* x, int first_row, int rows, int depth, int k, int lane) {
    Inputs result;
    UNROLL
    for (int i = 0; i < 2; ++i) {
      const size_t row = min(first_row + 2 * fragment_place(lane) + i, rows - 1);
      result.halves[i] = *(const DEVICE Packed<T, 4>*)(x + row * depth + k + fragment_row(lane) * 4);
    }
    return result;
  }

  // Packs of weights of the rows r and r + 8: adds to these (first two sums, last two), columns
  // 2 * place and 2 * place + 1.
  static FUNC void multiply(
      THREAD float* sums, const THREAD Pack& upper, const THREAD Pack& lower, const THREAD Inputs& x) {
    float a[2][8];
    unpack<T>(upper, a[0]);
    unpack<T>(lower, a[1]);
    UNROLL
    for (int e = 0; e < 4; ++e) {
      const float first = float(x.halves[0].values[e]), second = float(x.halves[1].values[e]);
      multiply_8x8(sums, a[0][e], a[0][e + 4], first, second);
      multiply_8x8(sums + 2, a[1][e], a[1][e + 4], first, second);
    }
  }
};

} // namespace quire
