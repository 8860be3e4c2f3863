// y = x @ W^T for a few rows of x and an affine-quantised W, by matrix units.

typedef quire::QuantizedProduct<T, quire::Fragments<T, BITS>, GROUP, TILES, INPUT_TILES, SIMDGROUPS, DEPTH> Product;
typedef quire::TileSums<TILES, INPUT_TILES, SIMDGROUPS> Sums;

const int rows = x_shape[0];
const int depth = x_shape[1];
const int columns = w_shape[0];
const int row_tiles = quire::ceil_div(rows, int(Product::ROWS));
const int first_row = int(threadgroup_position_in_grid.x) % row_tiles * Product::ROWS;
const int first_column = int(threadgroup_position_in_grid.x) / row_tiles * (TILES * 16);
const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);

// Beyond the last row of x, that one is read again.
int taken[Product::LANE_ALL];
UNROLL
for (int i = 0; i < Product::LANE_ALL; ++i) {
  const int row = i / Product::LANE_ROWS * 8 + Product::lane_row(lane, i % Product::LANE_ROWS);
  taken[i] = quire::min(first_row + row, rows - 1);
}

float sums[Product::SUMS];
UNROLL
for (int i = 0; i < Product::SUMS; ++i) sums[i] = 0.0f;
Product::add(sums, x, taken, w, scales, biases, first_column, columns, depth, simdgroup, lane);

SHARED float shared_sums[Sums::SIZE];
const quire::WriteRows<T> write = {output, first_row, rows, first_column, columns};
Sums::write_all(sums, shared_sums, write, int(thread_index_in_threadgroup), simdgroup, lane);
