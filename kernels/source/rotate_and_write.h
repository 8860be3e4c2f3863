// Between the projection of queries, keys and values and attention, in one launch: the norms of
// queries and keys, rotary embeddings, and the writes of keys and values into their pages.
// A simdgroup takes one head of one row. Where queries are GATED, something else of the same size
// stands behind each of their heads.

constexpr int HEADS = HEADS_Q + 2 * HEADS_KV;
constexpr int GATES = GATED ? HEADS_Q : 0;

const int lane = int(thread_index_in_simdgroup);
const int index = int(threadgroup_position_in_grid.x) * SIMDGROUPS + int(simdgroup_index_in_threadgroup);
const int row = index / HEADS;
const int head = index % HEADS;
if (row < int(slot_mapping_shape[0])) {
  const bool is_query = head < HEADS_Q;
  const bool is_value = head >= HEADS_Q + HEADS_KV;
  quire::RotaryHead<T, D, ROTARY, TRADITIONAL> x;
  const int place = is_query && GATED ? 2 * head : is_query ? head : head + GATES;
  x.load(qkv + (size_t(row) * (HEADS + GATES) + place) * D, lane);
  if (!is_value) {
    if (HAS_NORMS) x.norm(is_query ? query_norm : key_norm, quire::as_float(EPS), lane);
    if (FACTOR != 0) x.scale(quire::as_float(FACTOR));
    x.rotate(float(positions[row]), inverse_frequencies, lane);
  }
  const int slot = slot_mapping[row];
  const int kv_head = is_value ? head - HEADS_Q - HEADS_KV : head - HEADS_Q;
  const size_t page =
      ((size_t(slot / BLOCK_SIZE) * HEADS_KV + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE) * D;
  const size_t kept = (size_t(row) * HEADS_KV + kv_head) * D;
  UNROLL
  for (int n = 0; n < x.count(); ++n) {
    const int i = x.place(n, lane);
    if (i >= D) continue;
    const T value = T(x.values[n]);
    if (is_query) {
      queries[(size_t(row) * HEADS_Q + head) * D + i] = value;
    } else if (is_value) {
      ((DEVICE T*)value_pages)[page + i] = value;
      if (KEEP_ROWS) values[kept + i] = value;
    } else {
      ((DEVICE T*)key_pages)[page + i] = value;
      if (KEEP_ROWS) keys[kept + i] = value;
    }
  }
}
if (index == 0 && lane == 0) new_fence[0] = 1;
