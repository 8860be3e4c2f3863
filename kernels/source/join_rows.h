// Rows of two arrays, one behind the other, by a list of indices. One thread moves one pack.

const size_t index =
    size_t(threadgroup_position_in_grid.x) * THREADS + size_t(thread_index_in_threadgroup);
const int row = int(index / PACKS);
const int pack = int(index % PACKS);
if (row < int(indices_shape[0])) {
  const int source = indices[row];
  const int count = int(first_shape[0]);
  ((DEVICE quire::Pack*)joined)[size_t(row) * PACKS + pack] = source < count
      ? ((const DEVICE quire::Pack*)first)[size_t(source) * PACKS + pack]
      : ((const DEVICE quire::Pack*)second)[size_t(source - count) * PACKS + pack];
}
