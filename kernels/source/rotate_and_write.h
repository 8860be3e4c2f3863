// Between the projection of queries, keys and values and attention, in one launch: the norms of
// queries and keys, rotary embeddings, and the writes of keys and values into their pages.
// A simdgroup takes one head of one row.

constexpr int HALF = ROTARY / 2;
constexpr int NP = quire::ceil_div(HALF, 32); // rotated pairs of a lane
constexpr int NR = quire::ceil_div(D - ROTARY, 32); // further values of a lane
constexpr int HEADS = HEADS_Q + 2 * HEADS_KV;

const int lane = int(thread_index_in_simdgroup);
const int index = int(threadgroup_position_in_grid.x) * SIMDGROUPS + int(simdgroup_index_in_threadgroup);
const int row = index / HEADS;
const int head = index % HEADS;
if (row < int(slot_mapping_shape[0])) {
  const bool is_query = head < HEADS_Q;
  const bool is_value = head >= HEADS_Q + HEADS_KV;
  const size_t source = size_t(index) * D;
  float first[NP], second[NP], rest[NR > 0 ? NR : 1];
  float squares = 0.0f;
  UNROLL
  for (int n = 0; n < NP; ++n) {
    const int pair = lane + 32 * n;
    const bool real = pair < HALF;
    first[n] = real ? float(qkv[source + (TRADITIONAL ? 2 * pair : pair)]) : 0.0f;
    second[n] = real ? float(qkv[source + (TRADITIONAL ? 2 * pair + 1 : pair + HALF)]) : 0.0f;
    squares += first[n] * first[n] + second[n] * second[n];
  }
  UNROLL
  for (int n = 0; n < NR; ++n) {
    const int i = ROTARY + lane + 32 * n;
    rest[n] = i < D ? float(qkv[source + i]) : 0.0f;
    squares += rest[n] * rest[n];
  }
  if (HAS_NORMS && !is_value) {
    // Rounded to T in between, as a norm of its own would be.
    const float factor = quire::rsqrt(quire::simd_sum(squares) / float(D) + quire::as_float(EPS));
    UNROLL
    for (int n = 0; n < NP; ++n) {
      const int pair = quire::min(lane + 32 * n, HALF - 1);
      const int a = TRADITIONAL ? 2 * pair : pair;
      const int b = TRADITIONAL ? 2 * pair + 1 : pair + HALF;
      first[n] = float(T(first[n] * factor * float(is_query ? query_norm[a] : key_norm[a])));
      second[n] = float(T(second[n] * factor * float(is_query ? query_norm[b] : key_norm[b])));
    }
    UNROLL
    for (int n = 0; n < NR; ++n) {
      const int i = quire::min(ROTARY + lane + 32 * n, D - 1);
      rest[n] = float(T(rest[n] * factor * float(is_query ? query_norm[i] : key_norm[i])));
    }
  }
  if (!is_value) {
    UNROLL
    for (int n = 0; n < NP; ++n) {
      const int pair = quire::min(lane + 32 * n, HALF - 1);
      const float angle = float(positions[row]) * inverse_frequencies[pair];
      const float cosine = quire::cos(angle), sine = quire::sin(angle);
      const float rotated = first[n] * cosine - second[n] * sine;
      second[n] = first[n] * sine + second[n] * cosine;
      first[n] = rotated;
    }
  }
  const int slot = slot_mapping[row];
  const int kv_head = is_value ? head - HEADS_Q - HEADS_KV : head - HEADS_Q;
  const size_t page =
      ((size_t(slot / BLOCK_SIZE) * HEADS_KV + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE) * D;
  const size_t kept = (size_t(row) * HEADS_KV + kv_head) * D;
  UNROLL
  for (int n = 0; n < 2 * NP + NR; ++n) {
    const bool in_rest = n >= 2 * NP;
    const int pair = lane + 32 * (n / 2);
    const int i = in_rest ? ROTARY + lane + 32 * (n - 2 * NP)
                          : TRADITIONAL ? 2 * pair + n % 2 : pair + (n % 2) * HALF;
    const bool real = in_rest ? i < D : pair < HALF;
    const T value = T(in_rest ? rest[in_rest ? n - 2 * NP : 0] : n % 2 ? second[in_rest ? 0 : n / 2] : first[in_rest ? 0 : n / 2]);
    if (real) {
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
}
if (index == 0 && lane == 0) written[0] = 1;
