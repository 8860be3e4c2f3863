// Writes the keys and values of all rows into their slots, in place.
// One thread moves one pack. The pages are inputs, so MLX believes they are only read: whoever reads
// them next takes `new_fence` as an input, and `fence` is an output of whoever read them last.
// KEEP_ROWS also copies the rows, for readers of the new rows alone: one that took them from where
// they came from would not need this kernel, and MLX leaves out what nobody needs.

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
    const size_t source = size_t(row) * row_packs + pack;
    const quire::Pack moved = ((const DEVICE quire::Pack*)keys)[source];
    ((DEVICE quire::Pack*)key_pages)[target] = moved;
    if (KEEP_ROWS) ((DEVICE quire::Pack*)kept_keys)[source] = moved;
  } else {
    const int packs = DV / int(16 / sizeof(T));
    const int place = pack - row_packs;
    const size_t target = ((block * HEADS_V + place / packs) * BLOCK_SIZE + offset) * packs + place % packs;
    const size_t source = size_t(row) * value_packs + place;
    const quire::Pack moved = ((const DEVICE quire::Pack*)values)[source];
    ((DEVICE quire::Pack*)value_pages)[target] = moved;
    if (KEEP_ROWS) ((DEVICE quire::Pack*)kept_values)[source] = moved;
  }
}
if (index == 0) new_fence[0] = 1;
