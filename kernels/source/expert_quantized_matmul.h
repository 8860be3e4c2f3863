// y[p] = x[p / EACH] @ W[e[p]]^T for the pairs p of a step's rows and their experts, by matrix units, and
// W quantised in MLX's affine mode or, FP4, in mxfp4, which has no biases.
//
// Each matrix that is wanted is read once for up to INPUT_TILES * 8 rows. `pairs` are the experts of all
// pairs or, SORTED, pairs in the order of their experts.

typedef typename quire::CodesOf<T, BITS, FP4>::Codes Codes;
typedef quire::QuantizedProduct<T, Codes, GROUP, TILES, INPUT_TILES, SIMDGROUPS, DEPTH> Product;
typedef quire::TileSums<TILES, INPUT_TILES, SIMDGROUPS> Sums;

const int columns = w_shape[1];
const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);

SHARED int shared_pairs[MOST];
SHARED unsigned int shared_counts[SIMDGROUPS];
SHARED float shared_sums[Sums::SIZE];

const int group = int(threadgroup_position_in_grid.x);
const DEVICE int* begins = (const DEVICE int*)starts;
const quire::ExpertPart part = SORTED
    ? quire::sorted_part(begins, columns, TILES * 16, group)
    : quire::find_part<SIMDGROUPS>(
          pairs, pairs_shape[0], w_shape[0], columns, TILES * 16, group, shared_pairs, shared_counts, simdgroup,
          lane);
if (part.num_pairs > 0) {
  const int words = w_shape[2];
  const int depth = words * (32 / BITS);
  const size_t first = size_t(part.expert) * columns;
  const quire::QuantizedExpert<T, Product> weights = {
      w + first * words, scales + first * (depth / GROUP), (const DEVICE T*)biases + first * (depth / GROUP), depth};
  const int index = int(thread_index_in_threadgroup);
  if (SORTED) {
    const quire::WritePairs<T, const DEVICE unsigned int*> write = {
        output, pairs + begins[part.expert], 0, part.num_pairs, part.first_column, columns};
    quire::multiply_pairs<EACH, Product, Sums>(x, weights, write, shared_sums, index, simdgroup, lane);
  } else {
    const quire::WritePairs<T, SHARED_POINTER(const int)> write = {
        output, shared_pairs, 0, part.num_pairs, part.first_column, columns};
    quire::multiply_pairs<EACH, Product, Sums>(x, weights, write, shared_sums, index, simdgroup, lane);
  }
}
