// y = x @ W^T for a few rows of x and an affine-quantised W, by matrix units.
//
// A simdgroup takes TILES * 16 rows of W, which are columns of y, and INPUT_TILES * 8 rows of x. The
// simdgroups of a threadgroup share K, and DEPTH quantisation groups of weights are under way before
// any arithmetic. With w = scale * q + bias, the products of a group are sums of the integers q and
// of x alone, which are exact in 16 bits; scale and bias are applied once a group, in float32.

typedef quire::Fragments<T, BITS> Fragments;
constexpr int VALUES = 32 / BITS; // of a word
constexpr int WORDS = GROUP / VALUES / 4; // of a quantisation group, in one lane
constexpr int COLUMNS = TILES * 16;
constexpr int ROWS = INPUT_TILES * 8;

const int rows = x_shape[0];
const int depth = x_shape[1];
const int columns = w_shape[0];
const int groups = depth / GROUP;
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

for (int base = simdgroup * DEPTH; base < groups; base += SIMDGROUPS * DEPTH) {
  quire::Packed<unsigned int, WORDS> packed[DEPTH][TILES * 2];
  T scale[DEPTH][TILES * 2], bias[DEPTH][TILES * 2];
  UNROLL
  for (int d = 0; d < DEPTH; ++d) {
    const int group = quire::min(base + d, groups - 1);
    UNROLL
    for (int i = 0; i < TILES * 2; ++i) {
      const int column = quire::min(first_column + i * 8 + row, columns - 1);
      const size_t at = size_t(column) * groups + group;
      packed[d][i] = ((const DEVICE quire::Packed<unsigned int, WORDS>*)w)[at * 4 + place];
      scale[d][i] = scales[at];
      bias[d][i] = biases[at];
    }
  }
  UNROLL
  for (int d = 0; d < DEPTH; ++d) {
    if (base + d < groups) {
      float products[TILES * INPUT_TILES * 4], totals[INPUT_TILES * 4];
      UNROLL
      for (int i = 0; i < TILES * INPUT_TILES * 4; ++i) products[i] = 0.0f;
      UNROLL
      for (int i = 0; i < INPUT_TILES * 4; ++i) totals[i] = 0.0f;
      UNROLL
      for (int j = 0; j < WORDS; ++j) {
        typename Fragments::Inputs inputs[INPUT_TILES];
        UNROLL
        for (int m = 0; m < INPUT_TILES; ++m) {
          inputs[m] = Fragments::inputs(
              x, first_row + m * 8, rows, depth, (base + d) * GROUP + j * VALUES, WORDS * VALUES, lane);
          Fragments::add(totals + m * 4, inputs[m]);
        }
        UNROLL
        for (int i = 0; i < TILES; ++i) {
          const typename Fragments::Weights weights =
              Fragments::weights(packed[d][i * 2].values[j], packed[d][i * 2 + 1].values[j]);
          UNROLL
          for (int m = 0; m < INPUT_TILES; ++m) {
            Fragments::multiply(products + (i * INPUT_TILES + m) * 4, weights, inputs[m]);
          }
        }
      }
      UNROLL
      for (int i = 0; i < TILES; ++i) {
        UNROLL
        for (int e = 0; e < INPUT_TILES * 4; ++e) {
          const float s = float(scale[d][i * 2 + e % 4 / 2]);
          const float b = float(bias[d][i * 2 + e % 4 / 2]) - Fragments::OFFSET * s;
          acc[i * INPUT_TILES * 4 + e] += products[i * INPUT_TILES * 4 + e] * s;
          acc[i * INPUT_TILES * 4 + e] += totals[e] * b;
        }
      }
    }
  }
}

// Sum over the simdgroups, 16 columns at a time. The odd stride keeps lanes off each other's banks.
constexpr int STRIDE = 20;
SHARED float shared_sums[SIMDGROUPS * ROWS * STRIDE];
UNROLL
for (int i = 0; i < TILES; ++i) {
  UNROLL
  for (int e = 0; e < INPUT_TILES * 4; ++e) {
    const int tile_row = e / 4 * 8 + place * 2 + e % 2;
    shared_sums[(simdgroup * ROWS + tile_row) * STRIDE + e % 4 / 2 * 8 + row] = acc[i * INPUT_TILES * 4 + e];
  }
  BARRIER();
  for (int j = int(thread_index_in_threadgroup); j < ROWS * 16; j += SIMDGROUPS * 32) {
    const int column = first_column + i * 16 + j % 16;
    float sum = 0.0f;
    UNROLL
    for (int s = 0; s < SIMDGROUPS; ++s) sum += shared_sums[(s * ROWS + j / 16) * STRIDE + j % 16];
    if (first_row + j / 16 < rows && column < columns) {
      output[size_t(first_row + j / 16) * columns + column] = T(sum);
    }
  }
  if (i + 1 < TILES) BARRIER();
}
