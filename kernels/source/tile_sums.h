// Sums of products that simdgroups which share K have of the same tiles; stands after fragments.

namespace quire {

// Into rows of a result, from `first_row` and `first_column` on.
template <typename T>
struct WriteRows {
  DEVICE T* output;
  int first_row, rows, first_column, columns;

  FUNC void at(int row, int column, float sum) const {
    row += first_row;
    column += first_column;
    if (row < rows && column < columns) output[size_t(row) * columns + column] = T(sum);
  }
};

template <int TILES, int INPUT_TILES, int SIMDGROUPS>
struct TileSums {
  // 16 columns, and of as many rows as threadgroup memory takes, at a time. The odd stride keeps lanes
  // off each other's banks.
  enum {
    STRIDE = 20,
    FITTING = 32 / SIMDGROUPS,
    ROUND = INPUT_TILES < FITTING ? INPUT_TILES : FITTING,
    SIZE = SIMDGROUPS * ROUND * 8 * STRIDE
  };

  // `write.at(row, column, sum)` of each row and column of the tiles, once. `shared` has SIZE floats,
  // which nobody uses any more.
  template <typename Write>
  static FUNC void write_all(
      const THREAD float* sums, SHARED_POINTER(float) shared, Write write, int index, int simdgroup, int lane) {
    const int row = fragment_row(lane);
    const int place = fragment_place(lane);
    UNROLL
    for (int i = 0; i < TILES; ++i) {
      UNROLL
      for (int m = 0; m < INPUT_TILES; m += ROUND) {
        UNROLL
        for (int e = 0; e < ROUND * 4; ++e) {
          const int tile_row = e / 4 * 8 + place * 2 + e % 2;
          shared[(simdgroup * ROUND * 8 + tile_row) * STRIDE + e % 4 / 2 * 8 + row] =
              sums[(i * INPUT_TILES + m) * 4 + e];
        }
        BARRIER();
        for (int j = index; j < ROUND * 128; j += SIMDGROUPS * 32) {
          float sum = 0.0f;
          UNROLL
          for (int s = 0; s < SIMDGROUPS; ++s) sum += shared[(s * ROUND * 8 + j / 16) * STRIDE + j % 16];
          write.at(m * 8 + j / 16, i * 16 + j % 16, sum);
        }
        if (i + 1 < TILES || m + ROUND < INPUT_TILES) BARRIER();
      }
    }
  }
};

} // namespace quire
