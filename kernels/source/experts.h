// The rows that go to one expert of many; stands after fragments.
//
// A step's pairs of a row and an expert lie in the order of the rows. A threadgroup looks for all that
// go to its expert, so that nothing is sorted and results are written where they belong. Of many pairs
// it is told where they are.

namespace quire {

// Fills `found` with the places of `expert` among so many `experts`, in order, and returns their
// number. `counts` has room for a number of each simdgroup.
template <int SIMDGROUPS>
FUNC int find_pairs(
    const DEVICE unsigned int* experts, int pairs, unsigned int expert, SHARED_POINTER(int) found,
    SHARED_POINTER(unsigned int) counts, int simdgroup, int lane) {
  int total = 0;
  for (int base = 0; base < pairs; base += SIMDGROUPS * 32) {
    const int pair = base + simdgroup * 32 + lane;
    const unsigned int mine = pair < pairs && experts[min(pair, pairs - 1)] == expert ? 1 : 0;
    unsigned int upto = mine; // so many in this simdgroup, this lane included
    UNROLL
    for (int step = 1; step < 32; step *= 2) {
      const unsigned int before = shuffle(upto, max(lane - step, 0));
      upto += lane >= step ? before : 0;
    }
    if (lane == 31) counts[simdgroup] = upto;
    BARRIER();
    int first = total;
    UNROLL
    for (int s = 0; s < SIMDGROUPS; ++s) {
      first += s < simdgroup ? int(counts[s]) : 0;
      total += int(counts[s]);
    }
    if (mine != 0) found[first + int(upto) - 1] = pair;
    BARRIER();
  }
  return total;
}

// What a threadgroup computes: some columns for all pairs of one expert, or nothing.
struct ExpertPart {
  int expert, num_pairs, first_column;
};

// There is a threadgroup for each tile of columns of every expert or, if those are more than pairs, of
// every pair: the first of an expert's pairs computes for all of them. Of what pads the pairs, no
// expert is one. `found` and `counts` are as in find_pairs.
template <int SIMDGROUPS>
FUNC ExpertPart find_part(
    const DEVICE unsigned int* experts, int pairs, int num_experts, int columns, int tile, int threadgroup_index,
    SHARED_POINTER(int) found, SHARED_POINTER(unsigned int) counts, int simdgroup, int lane) {
  const int tiles = ceil_div(columns, tile);
  const int slot = threadgroup_index / tiles;
  const bool by_pair = pairs <= num_experts;
  ExpertPart part;
  part.expert = by_pair ? int(experts[slot]) : slot;
  part.first_column = threadgroup_index % tiles * tile;
  part.num_pairs = find_pairs<SIMDGROUPS>(experts, pairs, part.expert, found, counts, simdgroup, lane);
  const bool is_wanted = part.expert < num_experts && part.num_pairs > 0 && (!by_pair || found[0] == slot);
  if (!is_wanted) part.num_pairs = 0;
  return part;
}

// The same of pairs in the order of their experts, of which those of each start behind the ones before.
FUNC ExpertPart sorted_part(const DEVICE int* starts, int columns, int tile, int threadgroup_index) {
  const int tiles = ceil_div(columns, tile);
  const int expert = threadgroup_index / tiles;
  ExpertPart part;
  part.expert = expert;
  part.first_column = threadgroup_index % tiles * tile;
  part.num_pairs = starts[expert + 1] - starts[expert];
  return part;
}

// Into the rows of a result that stand in `pairs`, from `first_pair` and `first_column` on.
template <typename T, typename Pairs>
struct WritePairs {
  DEVICE T* output;
  Pairs pairs;
  int first_pair, num_pairs, first_column, columns;

  FUNC void at(int row, int column, float sum) const {
    const int place = first_pair + row;
    column += first_column;
    if (place < num_pairs && column < columns) output[size_t(pairs[place]) * columns + column] = T(sum);
  }
};

// One expert's part of a result: `pairs` are its own, and `weights.add` adds the products of its
// matrix. `shared` has Sums::SIZE floats.
template <int EACH, typename Product, typename Sums, typename T, typename Weights, typename Pairs>
FUNC void multiply_pairs(
    const DEVICE T* x, Weights weights, WritePairs<T, Pairs> write, SHARED_POINTER(float) shared, int index,
    int simdgroup, int lane) {
  for (; write.first_pair < write.num_pairs; write.first_pair += Product::ROWS) {
    // Beyond the last pair, that one's row is read again.
    int rows[Product::LANE_ALL];
    UNROLL
    for (int i = 0; i < Product::LANE_ALL; ++i) {
      const int row = i / Product::LANE_ROWS * 8 + Product::lane_row(lane, i % Product::LANE_ROWS);
      rows[i] = int(write.pairs[min(write.first_pair + row, write.num_pairs - 1)]) / EACH;
    }
    float sums[Product::SUMS];
    UNROLL
    for (int i = 0; i < Product::SUMS; ++i) sums[i] = 0.0f;
    weights.add(sums, x, rows, write.first_column, write.columns, simdgroup, lane);
    Sums::write_all(sums, shared, write, index, simdgroup, lane);
    BARRIER(); // until all have read the sums
  }
}

} // namespace quire
