// Products of 16-bit weights and rows of x by matrix units, in CUDA's words; stands after
// cuda_fragments.h. metal_dense_fragments.h says the same in Metal's.

namespace quire {

// What is read once and by nobody else: it takes no place of the first-level cache.
FUNC Pack load_once(const Pack* from) {
  Pack result;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(result.words[0]), "=r"(result.words[1]), "=r"(result.words[2]), "=r"(result.words[3])
      : "l"(from));
  return result;
}

template <typename T>
struct DenseFragments {
  // Which of eight rows of x a lane takes.
  enum { LANE_ROWS = 1 };
  static FUNC int lane_row(int lane, int) { return fragment_row(lane); }

  // What the lane's row has for a pack of weights: packs of a row's places follow each other from
  // value k on.
  struct Inputs {
    Pack pack;
  };
  static FUNC Inputs inputs(const T* x, const int* rows, int depth, int k, int lane) {
    return {*reinterpret_cast<const Pack*>(x + size_t(rows[0]) * depth + k + fragment_place(lane) * 8)};
  }

  // Packs of weights of the rows r and r + 8: adds to these (first two sums, last two), columns
  // 2 * place and 2 * place + 1.
  static FUNC void multiply(float* sums, const Pack& upper, const Pack& lower, const Inputs& x) {
    UNROLL
    for (int i = 0; i < 4; i += 2) {
      Pairs<T>::multiply(
          sums, upper.words[i], lower.words[i], upper.words[i + 1], lower.words[i + 1], x.pack.words[i],
          x.pack.words[i + 1]);
    }
  }
};

} // namespace quire
