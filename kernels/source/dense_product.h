// Sums of products of rows of x and 16-bit weights, by matrix units; stands after dense_fragments.
//
// A simdgroup takes TILES * 16 rows of w, which are columns of the result, and INPUT_TILES * 8 rows of
// x, in slices of 32 values of K. The SIMDGROUPS of a threadgroup share K, DEPTH slices at a time.
// While a simdgroup multiplies, the weights of its next DEPTH slices are on their way into the
// registers that it empties, and x's of the next AHEAD.

namespace quire {

template <typename T, int TILES, int INPUT_TILES, int SIMDGROUPS, int DEPTH>
struct DenseProduct {
  typedef DenseFragments<T> Fragments;
  enum {
    SLICE = 32,
    STEP = SIMDGROUPS * DEPTH,
    // x comes from near caches: less of it need be under way, and registers are few.
    NEAR = INPUT_TILES > 4 ? 1 : INPUT_TILES > 2 ? 2 : 4,
    AHEAD = NEAR < DEPTH ? NEAR : DEPTH,
    LANE_ROWS = Fragments::LANE_ROWS,
    ROWS = INPUT_TILES * 8,
    LANE_ALL = INPUT_TILES * LANE_ROWS, // of them, that a lane takes
    SUMS = TILES * INPUT_TILES * 4
  };

  // Which of the eight rows of an input tile a lane takes.
  static FUNC int lane_row(int lane, int i) { return Fragments::lane_row(lane, i); }

  // Adds to `sums`. `rows` are those of x whose values the lane takes, LANE_ROWS of each input tile;
  // columns beyond the last of w's `columns` rows are that one again.
  static FUNC void add(
      THREAD float* sums, const DEVICE T* x, const THREAD int* rows, const DEVICE T* w, int first_column,
      int columns, int depth, int simdgroup, int lane) {
    const int slices = depth / SLICE;
    const int row = fragment_row(lane);
    const int place = fragment_place(lane);
    Pack weights[DEPTH][TILES * 2];
    typename Fragments::Inputs inputs[AHEAD][INPUT_TILES];
    // The first turn only loads.
    for (int base = simdgroup * DEPTH - STEP; base < slices; base += STEP) {
      UNROLL
      for (int d = 0; d < DEPTH; ++d) {
        if (base >= 0 && base + d < slices) {
          UNROLL
          for (int i = 0; i < TILES; ++i) {
            UNROLL
            for (int m = 0; m < INPUT_TILES; ++m) {
              Fragments::multiply(
                  sums + (i * INPUT_TILES + m) * 4, weights[d][i * 2], weights[d][i * 2 + 1], inputs[d % AHEAD][m]);
            }
          }
        }
        const int next = base + STEP + d;
        if (next < slices) {
          UNROLL
          for (int i = 0; i < TILES * 2; ++i) {
            const int column = min(first_column + i * 8 + row, columns - 1);
            const DEVICE Pack* packs = (const DEVICE Pack*)(w + size_t(column) * depth);
            weights[d][i] = load_once(packs + next * 4 + place);
          }
        }
        const int near = d + AHEAD < DEPTH ? base + d + AHEAD : next + AHEAD - DEPTH;
        if (near >= 0 && near < slices) {
          UNROLL
          for (int m = 0; m < INPUT_TILES; ++m) {
            inputs[d % AHEAD][m] = Fragments::inputs(x, rows + m * LANE_ROWS, depth, near * SLICE, lane);
          }
        }
      }
    }
  }
};

// A matrix of (columns, depth), as the products of experts take it.
template <typename T, typename Product>
struct DenseExpert {
  const DEVICE T* w;
  int depth;

  FUNC void add(
      THREAD float* sums, const DEVICE T* x, const THREAD int* rows, int first_column, int columns, int simdgroup,
      int lane) const {
    Product::add(sums, x, rows, w, first_column, columns, depth, simdgroup, lane);
  }
};

} // namespace quire
