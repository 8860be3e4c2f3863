// Rows of up to three arrays, by one list of indices. One thread moves one pack.

const int packs = PACKS_A + PACKS_B + PACKS_C;
const size_t index =
    size_t(threadgroup_position_in_grid.x) * THREADS + size_t(thread_index_in_threadgroup);
const int row = int(index / packs);
const int pack = int(index % packs);
if (row < int(indices_shape[0])) {
  const size_t source = indices[row];
  if (pack < PACKS_A) {
    ((DEVICE quire::Pack*)taken_a)[size_t(row) * PACKS_A + pack] =
        ((const DEVICE quire::Pack*)a)[source * PACKS_A + pack];
  } else if (pack < PACKS_A + PACKS_B) {
    const int place = pack - PACKS_A;
    ((DEVICE quire::Pack*)taken_b)[size_t(row) * PACKS_B + place] =
        ((const DEVICE quire::Pack*)b)[source * PACKS_B + place];
  } else {
    const int place = pack - PACKS_A - PACKS_B;
    ((DEVICE quire::Pack*)taken_c)[size_t(row) * PACKS_C + place] =
        ((const DEVICE quire::Pack*)c)[source * PACKS_C + place];
  }
}
