// Attention of consecutive rows of a sequence over its pages (FlashAttention-2: Dao, 2023).
//
// A threadgroup takes one work item: a few tokens of a sequence, a stretch of the keys before and at
// them, and one key head with up to GROUP of the query heads that share it. Each token and
// head is a row of matrix products; a simdgroup takes 16 of them. KEYS keys and values at a time lie
// in threadgroup memory; with two STAGES the next ones are on their way there meanwhile. Sums of wide
// values are for several threadgroups, SLICE dimensions each; then a lane has no room to keep its
// queries either.

typedef quire::AttentionFragments<T> Fragments;
constexpr int VEC = 8; // values of a pack
constexpr int KEY_PACKS = DK / VEC;
constexpr int VALUE_PACKS = SLICE / VEC;
constexpr int SLICES = quire::ceil_div(DV, SLICE);
constexpr int QUERY_STEPS = quire::ceil_div(DK, 32);
constexpr int VALUE_STEPS = quire::ceil_div(SLICE, 16);
// Strides, in packs, that keep the lanes of a load off each other's banks.
constexpr int KEY_STRIDE = (QUERY_STEPS | 1) * 4;
constexpr int VALUE_STRIDE = VALUE_STEPS * 2 | 1;
constexpr bool PADDED = KEY_PACKS < QUERY_STEPS * 4 || VALUE_PACKS < VALUE_STEPS * 2;
constexpr int THREADS = SIMDGROUPS * 32;
constexpr int HEADS = HEADS_PER_KV * KV_HEADS;
constexpr int RUN = KEYS < BLOCK_SIZE ? KEYS : BLOCK_SIZE; // keys side by side in a block

const DEVICE int* item = items + int(threadgroup_position_in_grid.x) * 8;
const int first_query = item[0];
const int num_tokens = item[1];
const int start = item[2]; // position of the first token
const size_t table = size_t(item[3]) * size_t(block_tables_shape[1]);
const int begin = item[4];
const int end = item[5];
const int kv_head = int(threadgroup_position_in_grid.y);
const int slice = int(threadgroup_position_in_grid.z) % SLICES;
const int first_head = kv_head * HEADS_PER_KV + int(threadgroup_position_in_grid.z) / SLICES * GROUP;
const int num_heads = quire::min(GROUP, (kv_head + 1) * HEADS_PER_KV - first_head);
const int thread_index = int(thread_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int place = quire::fragment_place(lane);
const float scale = quire::as_float(SCALE) * quire::LOG2_E;

// This lane's two rows. Those beyond the tokens or heads repeat the first and are not written.
int token[2], head[2];
bool is_row[2];
UNROLL
for (int h = 0; h < 2; ++h) {
  const int row = int(simdgroup_index_in_threadgroup) * 16 + h * 8 + quire::fragment_row(lane);
  is_row[h] = row < num_tokens * GROUP && row % GROUP < num_heads;
  token[h] = is_row[h] ? row / GROUP : 0;
  head[h] = first_head + (is_row[h] ? row % GROUP : 0);
}

const DEVICE T* upper = queries + (size_t(first_query + token[0]) * HEADS + head[0]) * DK;
const DEVICE T* lower = queries + (size_t(first_query + token[1]) * HEADS + head[1]) * DK;
typename Fragments::Queries q[SLICES == 1 ? QUERY_STEPS : 1];
if (SLICES == 1) {
  UNROLL
  for (int s = 0; s < QUERY_STEPS; ++s) {
    q[SLICES == 1 ? s : 0] = Fragments::queries(upper, lower, s * 32, DK, lane);
  }
}

SHARED quire::Pack shared_keys[STAGES * KEYS * KEY_STRIDE];
SHARED quire::Pack shared_values[STAGES * KEYS * VALUE_STRIDE];
if (PADDED) {
  quire::Pack zero;
  UNROLL
  for (int i = 0; i < 4; ++i) zero.words[i] = 0;
  for (int i = thread_index; i < STAGES * KEYS * KEY_STRIDE; i += THREADS) shared_keys[i] = zero;
  for (int i = thread_index; i < STAGES * KEYS * VALUE_STRIDE; i += THREADS) shared_values[i] = zero;
  BARRIER();
}

float acc[VALUE_STEPS * 8];
UNROLL
for (int i = 0; i < VALUE_STEPS * 8; ++i) acc[i] = 0.0f;
float peak[2] = {quire::HIDDEN, quire::HIDDEN}, total[2] = {0.0f, 0.0f};

const int first_base = begin / KEYS * KEYS;
for (int base = first_base - (STAGES - 1) * KEYS; base < end; base += KEYS) {
  if (STAGES == 2) {
    quire::wait_for_copies();
    BARRIER();
  }
  const int ahead = base + (STAGES - 1) * KEYS;
  if (ahead < end) {
    const int stage = ahead / KEYS % STAGES * KEYS;
    UNROLL
    for (int run = 0; run < KEYS; run += RUN) {
      // Blocks outside the stretch may not exist, and their slots may hold anything, even NaN,
      // which a weight of 0 does not hide: values there are zeros.
      const int position = ahead + run;
      const int index = quire::min(quire::max(position, begin), end - 1) / BLOCK_SIZE;
      const size_t block = block_tables[table + index];
      const size_t slot = (block * KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE;
      const DEVICE quire::Pack* keys = (const DEVICE quire::Pack*)key_pages + slot * KEY_PACKS;
      const DEVICE quire::Pack* values = (const DEVICE quire::Pack*)value_pages + slot * (DV / VEC);
      UNROLL
      for (int i = 0; i < RUN * KEY_PACKS; i += THREADS) {
        const int at = i + thread_index;
        const int key = stage + run + at / KEY_PACKS;
        if (at < RUN * KEY_PACKS) {
          quire::copy_pack(shared_keys + key * KEY_STRIDE + at % KEY_PACKS, keys + at, true);
        }
      }
      UNROLL
      for (int i = 0; i < RUN * VALUE_PACKS; i += THREADS) {
        const int at = i + thread_index;
        const int key = run + at / VALUE_PACKS;
        const int pack = slice * VALUE_PACKS + at % VALUE_PACKS;
        const bool is_inside = ahead + key >= begin && ahead + key < end && pack < DV / VEC;
        if (at < RUN * VALUE_PACKS) {
          quire::copy_pack(
              shared_values + (stage + key) * VALUE_STRIDE + at % VALUE_PACKS,
              values + at / VALUE_PACKS * (DV / VEC) + pack, is_inside);
        }
      }
    }
  }
  if (STAGES == 1) {
    quire::wait_for_copies();
    BARRIER();
  }
  if (base < first_base) continue;
  const int current = base / KEYS % STAGES * KEYS;

  float scores[KEYS / 2];
  UNROLL
  for (int i = 0; i < KEYS / 2; ++i) scores[i] = 0.0f;
  UNROLL
  for (int s = 0; s < QUERY_STEPS; ++s) {
    if (SLICES > 1) q[0] = Fragments::queries(upper, lower, s * 32, DK, lane);
    UNROLL
    for (int j = 0; j < KEYS / 8; ++j) {
      Fragments::score(
          scores + j * 4, q[SLICES == 1 ? s : 0], shared_keys + (current + j * 8) * KEY_STRIDE + s * 4, KEY_STRIDE, lane);
    }
  }
  // Most stretches are seen whole by every row.
  const int last_position = start + num_tokens - 1;
  if (base < begin || base + KEYS > end || base + KEYS - 1 > start ||
      (WINDOW > 0 && base <= last_position - WINDOW)) {
    UNROLL
    for (int i = 0; i < KEYS / 2; ++i) {
      const int key = base + i / 4 * 8 + place * 2 + i % 2;
      const int position = start + token[i % 4 / 2];
      const bool visible = key >= begin && key < end && key <= position &&
          (WINDOW == 0 || key > position - WINDOW);
      scores[i] = visible ? scores[i] : quire::HIDDEN;
    }
  }
  bool grew = false;
  float rescale[2];
  UNROLL
  for (int h = 0; h < 2; ++h) {
    float highest = peak[h];
    UNROLL
    for (int j = 0; j < KEYS / 8; ++j) {
      highest = quire::max(highest, quire::max(scores[j * 4 + h * 2], scores[j * 4 + h * 2 + 1]));
    }
    UNROLL
    for (int i = 0; i < 2; ++i) {
      highest = quire::max(highest, quire::shuffle_xor(highest, quire::ROW_MASKS[i]));
    }
    grew = grew || highest > peak[h];
    // While a row has seen no key its hidden ones weigh 0. The difference of two like products of
    // HIDDEN would not be 0, as one of them is not rounded where product and sum are fused.
    const float shift = highest > quire::HIDDEN ? highest * scale : 0.0f;
    rescale[h] = quire::exp2(peak[h] * scale - shift);
    peak[h] = highest;
    total[h] *= rescale[h];
    UNROLL
    for (int j = 0; j < KEYS / 8; ++j) {
      UNROLL
      for (int e = 0; e < 2; ++e) {
        const float weight = quire::exp2(scores[j * 4 + h * 2 + e] * scale - shift);
        scores[j * 4 + h * 2 + e] = weight;
        total[h] += weight;
      }
    }
  }
  if (quire::any(grew)) {
    UNROLL
    for (int i = 0; i < VALUE_STEPS * 8; ++i) acc[i] *= rescale[i % 4 / 2];
  }
  UNROLL
  for (int k = 0; k < KEYS / 16; ++k) {
    const typename Fragments::Weights weights = Fragments::weights(scores + k * 8, scores + k * 8 + 4);
    UNROLL
    for (int s = 0; s < VALUE_STEPS; ++s) {
      Fragments::weigh(
          acc + s * 8, weights, shared_values + (current + k * 16) * VALUE_STRIDE + s * 2,
          VALUE_STRIDE, lane);
    }
  }
  if (STAGES == 1) BARRIER();
}

UNROLL
for (int h = 0; h < 2; ++h) {
  UNROLL
  for (int i = 0; i < 2; ++i) total[h] += quire::shuffle_xor(total[h], quire::ROW_MASKS[i]);
  peak[h] *= scale;
  float factor = 1.0f;
  if (DIRECT) {
    if (HAS_SINKS) {
      const float sink = float(sinks[head[h]]) * quire::LOG2_E;
      const float highest = quire::max(peak[h], sink);
      factor = quire::exp2(peak[h] - highest);
      total[h] = total[h] * factor + quire::exp2(sink - highest);
    }
    factor = total[h] > 0.0f ? factor / total[h] : 0.0f;
  }
  if (is_row[h]) {
    const size_t result = size_t(item[6] + token[h] * item[7]) * HEADS + head[h];
    UNROLL
    for (int i = 0; i < VALUE_STEPS * 2; ++i) {
      const int own = i * 8 + place * 2;
      const int dim = slice * SLICE + own;
      if (own < SLICE && dim < DV) {
        output[result * DV + dim] = OUT(acc[i * 4 + h * 2] * factor);
        output[result * DV + dim + 1] = OUT(acc[i * 4 + h * 2 + 1] * factor);
      }
    }
    if (!DIRECT && place == 0 && slice == 0) {
      stats[result * 2] = peak[h];
      stats[result * 2 + 1] = total[h];
    }
  }
}
