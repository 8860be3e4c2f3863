// Products of 16-bit weights and rows of x by matrix units, in Metal's words; stands after
// metal_fragments.h. cuda_dense_fragments.h says the same in CUDA's.

namespace quire {

// What is read once and by nobody else.
FUNC Pack load_once(const DEVICE Pack* from) { return *from; }

template <typename T>
struct DenseFragments {
  // Which of eight rows of x a lane takes.
  enum { LANE_ROWS = 2 };
  static FUNC int lane_row(int lane, int i) { return 2 * fragment_place(lane) + i; }

  // What the lane's rows have for a pack of weights: packs of a row's places follow each other from
  // value k on. The lanes of fragment row r hold half r % 2 of place r / 2.
  struct Inputs {
    Packed<T, 4> halves[2];
  };
  static FUNC Inputs inputs(const DEVICE T* x, const THREAD int* rows, int depth, int k, int lane) {
    Inputs result;
    UNROLL
    for (int i = 0; i < 2; ++i) {
      result.halves[i] = *(const DEVICE Packed<T, 4>*)(x + size_t(rows[i]) * depth + k + fragment_row(lane) * 4);
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
