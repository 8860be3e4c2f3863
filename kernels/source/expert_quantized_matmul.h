// y[p] = x[p / EACH] @ W[e[p]]^T for the pairs p of a step's rows and their experts, by matrix units, and affine-
// quantised W.
//
// Each matrix that is wanted is read once for up to INPUT_TILES * 8 rows. There is a threadgroup for
// each tile of columns of every expert or, if those are more than pairs, of every pair: the first of
// an expert's pairs computes for all of them.

typedef quire::QuantizedProduct<T, BITS, GROUP, TILES, INPUT_TILES, SIMDGROUPS, DEPTH> Product;
typedef quire::TileSums<TILES, INPUT_TILES, SIMDGROUPS> Sums;

const int pairs = experts_shape[0];
const int num_experts = w_shape[0];
const int columns = w_shape[1];
const int tiles = quire::ceil_div(columns, TILES * 16);
const int slot = int(threadgroup_position_in_grid.x) / tiles;
const int first_column = int(threadgroup_position_in_grid.x) % tiles * (TILES * 16);
const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);

SHARED int shared_pairs[MOST];
SHARED unsigned int shared_counts[SIMDGROUPS];
SHARED float shared_sums[Sums::SIZE];

const bool by_pair = pairs <= num_experts;
const int expert = by_pair ? int(experts[slot]) : slot;
const int found =
    quire::find_pairs<SIMDGROUPS>(experts, pairs, expert, shared_pairs, shared_counts, simdgroup, lane);
// Of what pads the pairs, no expert is one.
const bool is_wanted = expert < num_experts && found > 0 && (!by_pair || shared_pairs[0] == slot);
if (is_wanted) {
  const int words = w_shape[2];
  const int depth = words * (32 / BITS);
  const size_t first = size_t(expert) * columns;
  const quire::QuantizedExpert<T, Product> weights = {
      w + first * words, scales + first * (depth / GROUP), biases + first * (depth / GROUP), depth};
  const quire::WritePairs<T> write = {output, shared_pairs, 0, found, first_column, columns};
  quire::multiply_pairs<EACH, Product, Sums>(
      x, weights, write, shared_sums, int(thread_index_in_threadgroup), simdgroup, lane);
}
