// y[p] = x[p / EACH] @ W[e[p]]^T for the pairs p of a step's rows and their experts, by matrix units.
//
// Each matrix that is wanted is read once for up to INPUT_TILES * 8 rows.

typedef quire::DenseProduct<T, TILES, INPUT_TILES, SIMDGROUPS, DEPTH> Product;
typedef quire::TileSums<TILES, INPUT_TILES, SIMDGROUPS> Sums;

const int columns = w_shape[1];
const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);

SHARED int shared_pairs[MOST];
SHARED unsigned int shared_counts[SIMDGROUPS];
SHARED float shared_sums[Sums::SIZE];

const quire::ExpertPart part = quire::find_part<SIMDGROUPS>(
    experts, experts_shape[0], w_shape[0], columns, TILES * 16, int(threadgroup_position_in_grid.x), shared_pairs,
    shared_counts, simdgroup, lane);
if (part.num_pairs > 0) {
  const int depth = w_shape[2];
  const quire::DenseExpert<T, Product> weights = {w + size_t(part.expert) * columns * depth, depth};
  const quire::WritePairs<T, SHARED_POINTER(const int)> write = {
      output, shared_pairs, 0, part.num_pairs, part.first_column, columns};
  quire::multiply_pairs<EACH, Product, Sums>(
      x, weights, write, shared_sums, int(thread_index_in_threadgroup), simdgroup, lane);
}
