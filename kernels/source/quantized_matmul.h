// y = x @ W^T for a few rows of x and an affine-quantised W, in plain multiply-adds.
//
// A simdgroup takes COLUMNS rows of W, which are columns of y, and ROWS rows of x. Its lanes take
// neighbouring words of W, so that both these and the values of x they meet are read in one stretch.
// The simdgroups of a threadgroup share K.

constexpr int VALUES = 32 / BITS; // of a word
constexpr int PACKS = VALUES * int(sizeof(T)) > 16 ? 2 : 1; // of the values of x that meet a word
constexpr int SUMS = ROWS * COLUMNS;
constexpr int OWNED = quire::owned_count(SUMS, 32);
constexpr float LEVELS = float(1 << BITS);

const int rows = x_shape[0];
const int columns = w_shape[0];
const int words = w_shape[1];
const int groups = words * VALUES / GROUP;
const int row_tiles = quire::ceil_div(rows, ROWS);
const int first_row = int(threadgroup_position_in_grid.x) % row_tiles * ROWS;
const int first_column = int(threadgroup_position_in_grid.x) / row_tiles * COLUMNS;
const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);

float acc[SUMS];
UNROLL
for (int i = 0; i < SUMS; ++i) acc[i] = 0.0f;

for (int base = simdgroup * 32 + lane; base < words; base += SIMDGROUPS * 32 * DEPTH) {
  unsigned int packed[DEPTH][COLUMNS];
  UNROLL
  for (int d = 0; d < DEPTH; ++d) {
    const int word = quire::min(base + d * SIMDGROUPS * 32, words - 1);
    UNROLL
    for (int c = 0; c < COLUMNS; ++c) {
      packed[d][c] = w[size_t(quire::min(first_column + c, columns - 1)) * words + word];
    }
  }
  UNROLL
  for (int d = 0; d < DEPTH; ++d) {
    const int word = base + d * SIMDGROUPS * 32;
    if (word < words) {
      // A value q, shifted into the mantissa of 1.0, reads 1 + q / LEVELS.
      float weight[COLUMNS][VALUES];
      UNROLL
      for (int c = 0; c < COLUMNS; ++c) {
        const size_t at =
            size_t(quire::min(first_column + c, columns - 1)) * groups + word * VALUES / GROUP;
        const float scale = float(scales[at]) * LEVELS;
        const float offset = float(biases[at]) - scale;
        UNROLL
        for (int e = 0; e < VALUES; ++e) {
          const int shift = 23 - BITS - e * BITS;
          const unsigned int bits = shift > 0 ? packed[d][c] << shift : packed[d][c] >> -shift;
          float one;
          quire::Word<float>::unpack((bits & (((1u << BITS) - 1) << (23 - BITS))) | 0x3f800000u, &one);
          weight[c][e] = one * scale + offset;
        }
      }
      UNROLL
      for (int r = 0; r < ROWS; ++r) {
        const size_t row = quire::min(first_row + r, rows - 1);
        float value[VALUES];
        UNROLL
        for (int p = 0; p < PACKS; ++p) {
          const quire::Packed<T, VALUES / PACKS> loaded =
              ((const DEVICE quire::Packed<T, VALUES / PACKS>*)x)[(row * words + word) * PACKS + p];
          UNROLL
          for (int e = 0; e < VALUES / PACKS; ++e) {
            value[p * (VALUES / PACKS) + e] = float(loaded.values[e]);
          }
        }
        UNROLL
        for (int e = 0; e < VALUES; ++e) {
          UNROLL
          for (int c = 0; c < COLUMNS; ++c) acc[r * COLUMNS + c] += value[e] * weight[c][e];
        }
      }
    }
  }
}

SHARED float shared_sums[SIMDGROUPS * SUMS];
quire::ReduceScatter<SUMS, 16>::run(acc, lane);
int first = 0; // of the sums that are in this lane now
UNROLL
for (int bit = 16, held = SUMS; bit > 0; bit /= 2) {
  if (held % 2 == 0) {
    held /= 2;
    first += (lane & bit) != 0 ? held : 0;
  }
}
UNROLL
for (int j = 0; j < OWNED; ++j) shared_sums[simdgroup * SUMS + first + j] = acc[j];
BARRIER();
for (int i = int(thread_index_in_threadgroup); i < SUMS; i += SIMDGROUPS * 32) {
  const int row = first_row + i / COLUMNS;
  const int column = first_column + i % COLUMNS;
  float sum = 0.0f;
  UNROLL
  for (int s = 0; s < SIMDGROUPS; ++s) sum += shared_sums[s * SUMS + i];
  if (row < rows && column < columns) output[size_t(row) * columns + column] = T(sum);
}
