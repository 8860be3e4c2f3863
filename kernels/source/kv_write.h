// Writes the keys and values of all rows into their slots, in place.
// One thread moves one pack. The pages are inputs, so MLX believes they are only read: whoever reads
// them next takes `written` as an input, and `after` is an output of whoever read them last.

const int row_packs = HEADS_K * (DK / int(16 / sizeof(T)));
const int value_packs = HEADS_V * (DV / int(16 / sizeof(T)));
const int index = int(threadgroup_position_in_grid.x) * THREADS + int(thread_index_in_threadgroup);
const int row = index / (row_packs + value_packs);
const int pack = index % (row_packs + value_packs);
if (row < int(slot_mapping_shape[0])) {
  const int slot = slot_mapping[row];
  const size_t block = slot / BLOCK_SIZE;
  const int offset = slot % BLOCK_SIZE;
  if (pack < row_packs) {
    const int packs = DK / int(16 / sizeof(T));
    const size_t target = ((block * HEADS_K + pack / packs) * BLOCK_SIZE + offset) * packs + pack % packs;
    ((DEVICE quire::Pack*)key_pages)[target] =
        ((const DEVICE quire::Pack*)keys)[size_t(row) * row_packs + pack];
  } else {
    const int packs = DV / int(16 / sizeof(T));
    const int place = pack - row_packs;
    const size_t target = ((block * HEADS_V + place / packs) * BLOCK_SIZE + offset) * packs + place % packs;
    ((DEVICE quire::Pack*)value_pages)[target] =
        ((const DEVICE quire::Pack*)values)[size_t(row) * value_packs + place];
  }
}
if (index == 0) written[0] = 1;
