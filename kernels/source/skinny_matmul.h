// y = x @ W^T for a few rows of x, by matrix units.
//
// A simdgroup takes TILES * 16 rows of W, which are columns of y, and INPUT_TILES * 8 rows of x, in
// slices of 32 values of K. The simdgroups of a threadgroup share K, DEPTH slices at a time. While a
// simdgroup multiplies, the weights of its next DEPTH slices are on their way into the registers
// that it empties, and x's of the next AHEAD.

typedef quire::DenseFragments<T> Fragments;
constexpr int SLICE = 32;
constexpr int STEP = SIMDGROUPS * DEPTH;
constexpr int COLUMNS = TILES * 16;
constexpr int ROWS = INPUT_TILES * 8;
// x comes from near caches: less of it need be under way, and registers are few.
constexpr int NEAR = INPUT_TILES > 4 ? 1 : INPUT_TILES > 2 ? 2 : 4;
constexpr int AHEAD = NEAR < DEPTH ? NEAR : DEPTH;

const int rows = x_shape[0];
const int depth = x_shape[1];
const int columns = w_shape[0];
const int slices = depth / SLICE;
const int row_tiles = quire::ceil_div(rows, ROWS);
const int first_row = int(threadgroup_position_in_grid.x) % row_tiles * ROWS;
const int first_column = int(threadgroup_position_in_grid.x) / row_tiles * COLUMNS;
const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);
const int row = quire::fragment_row(lane);
const int place = quire::fragment_place(lane);

float acc[TILES * INPUT_TILES * 4];
UNROLL
for (int i = 0; i < TILES * INPUT_TILES * 4; ++i) acc[i] = 0.0f;

quire::Pack weights[DEPTH][TILES * 2];
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
              acc + (i * INPUT_TILES + m) * 4, weights[d][i * 2], weights[d][i * 2 + 1], inputs[d % AHEAD][m]);
        }
      }
    }
    const int next = base + STEP + d;
    if (next < slices) {
      UNROLL
      for (int i = 0; i < TILES * 2; ++i) {
        const int column = quire::min(first_column + i * 8 + row, columns - 1);
        const DEVICE quire::Pack* packs = (const DEVICE quire::Pack*)(w + size_t(column) * depth);
        weights[d][i] = quire::load_once(packs + next * 4 + place);
      }
    }
    const int near = d + AHEAD < DEPTH ? base + d + AHEAD : next + AHEAD - DEPTH;
    if (near >= 0 && near < slices) {
      UNROLL
      for (int m = 0; m < INPUT_TILES; ++m) {
        inputs[d % AHEAD][m] = Fragments::inputs(x, first_row + m * 8, rows, depth, near * SLICE, lane);
      }
    }
  }
}

// Sum over the simdgroups: 16 columns, and of as many rows as threadgroup memory takes, at a time.
// The odd stride keeps lanes off each other's banks.
constexpr int STRIDE = 20;
constexpr int FITTING = 32 / SIMDGROUPS;
constexpr int ROUND = INPUT_TILES < FITTING ? INPUT_TILES : FITTING;
SHARED float shared_sums[SIMDGROUPS * ROUND * 8 * STRIDE];
UNROLL
for (int i = 0; i < TILES; ++i) {
  UNROLL
  for (int m = 0; m < INPUT_TILES; m += ROUND) {
    UNROLL
    for (int e = 0; e < ROUND * 4; ++e) {
      const int tile_row = e / 4 * 8 + place * 2 + e % 2;
      shared_sums[(simdgroup * ROUND * 8 + tile_row) * STRIDE + e % 4 / 2 * 8 + row] =
          acc[(i * INPUT_TILES + m) * 4 + e];
    }
    BARRIER();
    for (int j = int(thread_index_in_threadgroup); j < ROUND * 128; j += SIMDGROUPS * 32) {
      const int y_row = first_row + m * 8 + j / 16;
      const int column = first_column + i * 16 + j % 16;
      float sum = 0.0f;
      UNROLL
      for (int s = 0; s < SIMDGROUPS; ++s) sum += shared_sums[(s * ROUND * 8 + j / 16) * STRIDE + j % 16];
      if (y_row < rows && column < columns) output[size_t(y_row) * columns + column] = T(sum);
    }
    if (i + 1 < TILES || m + ROUND < INPUT_TILES) BARRIER();
  }
}
