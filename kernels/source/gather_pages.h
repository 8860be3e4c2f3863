// Copies the blocks of sequences into contiguous keys and values, (sequences, heads, tokens, dim).
// One thread moves one pack.

const int key_packs = DK / int(16 / sizeof(T));
const int value_packs = DV / int(16 / sizeof(T));
const int blocks = int(block_ids_shape[1]); // of each sequence
const int tokens = blocks * BLOCK_SIZE;
const int token_packs = HEADS_K * key_packs + HEADS_V * value_packs;
const size_t index =
    size_t(threadgroup_position_in_grid.x) * THREADS + size_t(thread_index_in_threadgroup);
const int place = int(index / token_packs);
const int pack = int(index % token_packs);
const int sequence = place / tokens;
const int token = place % tokens;
if (sequence < int(block_ids_shape[0])) {
  const size_t block = block_ids[sequence * blocks + token / BLOCK_SIZE];
  const int offset = token % BLOCK_SIZE;
  if (pack < HEADS_K * key_packs) {
    const int head = pack / key_packs;
    const size_t source = ((block * HEADS_K + head) * BLOCK_SIZE + offset) * key_packs;
    const size_t target = ((size_t(sequence) * HEADS_K + head) * tokens + token) * key_packs;
    ((DEVICE quire::Pack*)keys)[target + pack % key_packs] =
        ((const DEVICE quire::Pack*)key_pages)[source + pack % key_packs];
  } else {
    const int rest = pack - HEADS_K * key_packs;
    const int head = rest / value_packs;
    const size_t source = ((block * HEADS_V + head) * BLOCK_SIZE + offset) * value_packs;
    const size_t target = ((size_t(sequence) * HEADS_V + head) * tokens + token) * value_packs;
    ((DEVICE quire::Pack*)values)[target + rest % value_packs] =
        ((const DEVICE quire::Pack*)value_pages)[source + rest % value_packs];
  }
}
