// Copies the blocks of one sequence into contiguous keys and values, (heads, blocks * block, dim).
// One thread moves one pack.

const int key_packs = DK / int(16 / sizeof(T));
const int value_packs = DV / int(16 / sizeof(T));
const int tokens = int(block_ids_shape[0]) * BLOCK_SIZE;
const int token_packs = HEADS_K * key_packs + HEADS_V * value_packs;
const size_t index =
    size_t(threadgroup_position_in_grid.x) * THREADS + size_t(thread_index_in_threadgroup);
const int token = int(index / token_packs);
const int pack = int(index % token_packs);
if (token < tokens) {
  const size_t block = block_ids[token / BLOCK_SIZE];
  const int offset = token % BLOCK_SIZE;
  if (pack < HEADS_K * key_packs) {
    const int head = pack / key_packs;
    const size_t source = ((block * HEADS_K + head) * BLOCK_SIZE + offset) * key_packs;
    ((DEVICE quire::Pack*)keys)[(size_t(head) * tokens + token) * key_packs + pack % key_packs] =
        ((const DEVICE quire::Pack*)key_pages)[source + pack % key_packs];
  } else {
    const int place = pack - HEADS_K * key_packs;
    const int head = place / value_packs;
    const size_t source = ((block * HEADS_V + head) * BLOCK_SIZE + offset) * value_packs;
    ((DEVICE quire::Pack*)values)[(size_t(head) * tokens + token) * value_packs + place % value_packs] =
        ((const DEVICE quire::Pack*)value_pages)[source + place % value_packs];
  }
}
