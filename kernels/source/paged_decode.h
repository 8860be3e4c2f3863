// Attention of one query per sequence over its pages (flash decoding: Dao et al., 2023).
//
// A threadgroup takes one work item, a stretch of one row's context, and one key head with up to
// GROUP of the query heads that share it. Its simdgroups take tiles of the stretch in turn. LANES
// lanes load one key, 16 bytes each, and UNROLL_KEYS such loads are under way before any arithmetic.
// The scores of a tile are summed so that each ends in one lane, which alone takes its exponential.
//
// With ROTATE `queries` are a projection's rows of queries, keys and values, as of rotate_and_write.h,
// with something else behind each head of queries if they are GATED. Then the item with a row's newest token also writes its key and value to the pages; nobody else
// reads them in this step.

constexpr int VEC = 16 / sizeof(T);
constexpr int KEY_PACKS = DK / VEC;
constexpr int VALUE_PACKS = DV / VEC;
constexpr int LANES = quire::lanes_for(KEY_PACKS > VALUE_PACKS ? KEY_PACKS : VALUE_PACKS);
constexpr int KEYS = 32 / LANES; // keys of one load
constexpr int NK = quire::ceil_div(KEY_PACKS, LANES);
constexpr int NV = quire::ceil_div(VALUE_PACKS, LANES);
constexpr int EXTRA_PACKS = EXTRA > 0 ? EXTRA / VEC : 1;
constexpr int NX = quire::ceil_div(EXTRA_PACKS, LANES);
constexpr int U = UNROLL_KEYS;
constexpr int XU = EXTRA > 0 ? U : 1;
constexpr int XG = EXTRA > 0 ? GROUP : 1;
constexpr int KEY_LANES = LANES / U; // lanes that share the scores of one key, after the sums
constexpr int OWNED = quire::owned_count(GROUP, KEY_LANES);
constexpr int TILE = KEYS * U; // a power of two, as BLOCK_SIZE is
constexpr int BLOCKS = TILE <= BLOCK_SIZE ? 1 : TILE / BLOCK_SIZE;
constexpr size_t HEADS = HEADS_PER_KV * KV_HEADS;

const int item = int(threadgroup_position_in_grid.x);
const int kv_head = int(threadgroup_position_in_grid.y);
const int first_head = kv_head * HEADS_PER_KV + int(threadgroup_position_in_grid.z) * GROUP;
const int num_heads = quire::min(GROUP, (kv_head + 1) * HEADS_PER_KV - first_head);
const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);
const int part = lane % LANES;
const int sub = lane / LANES;
const int own_key = part / KEY_LANES; // which of a tile's loads this lane has the scores of

const int row = items[item * 4];
const int begin = items[item * 4 + 1];
const int end = items[item * 4 + 2];
const size_t table = size_t(row) * size_t(block_tables_shape[1]);
const float softcap = quire::as_float(SOFTCAP); // 0: none
const float scale = quire::as_float(SCALE) * (SOFTCAP == 0 ? quire::LOG2_E : 1.0f);

SHARED quire::Pack fresh[ROTATE ? (GROUP + 2) * KEY_PACKS : 1]; // queries, newest key, its value
const bool is_newest = ROTATE && end > begin && end == int(positions[row]) + 1;
const int stop = is_newest ? end - 1 : end; // of what is read from pages
if (ROTATE) {
  constexpr int STRIDE = GATED ? 2 : 1;
  constexpr size_t ALL = HEADS * STRIDE + 2 * KV_HEADS;
  constexpr int ROUNDS = quire::ceil_div(GROUP + 2, SIMDGROUPS);
  quire::RotaryHead<T, DK, ROTARY, TRADITIONAL> x[ROUNDS];
  UNROLL
  for (int r = 0; r < ROUNDS; ++r) {
    const int h = quire::min(simdgroup + r * SIMDGROUPS, GROUP + 1);
    const int head = h < GROUP ? (first_head + quire::min(h, num_heads - 1)) * STRIDE
                               : int(HEADS) * STRIDE + (h - GROUP) * KV_HEADS + kv_head;
    x[r].load(queries + (row * ALL + head) * DK, lane);
  }
  UNROLL
  for (int r = 0; r < ROUNDS; ++r) {
    const int h = simdgroup + r * SIMDGROUPS;
    if (h >= GROUP + 2) continue;
    if (h <= GROUP) {
      if (HAS_NORMS) x[r].norm(h < GROUP ? query_norm : key_norm, quire::as_float(EPS), lane);
      if (FACTOR != 0) x[r].scale(quire::as_float(FACTOR));
      x[r].rotate(float(positions[row]), inverse_frequencies, lane);
    }
    UNROLL
    for (int n = 0; n < x[r].count(); ++n) {
      const int i = x[r].place(n, lane);
      if (i < DK) ((SHARED_POINTER(T))fresh)[h * DK + i] = T(x[r].values[n]);
    }
  }
  BARRIER();
  if (is_newest && threadgroup_position_in_grid.z == 0) {
    const int slot = slot_mapping[row];
    const size_t first =
        ((size_t(slot / BLOCK_SIZE) * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE) * KEY_PACKS;
    for (int i = int(thread_index_in_threadgroup); i < 2 * KEY_PACKS; i += SIMDGROUPS * 32) {
      const quire::Pack pack = fresh[GROUP * KEY_PACKS + i];
      if (i < KEY_PACKS) {
        ((DEVICE quire::Pack*)key_pages)[first + i] = pack;
      } else {
        ((DEVICE quire::Pack*)value_pages)[first + i - KEY_PACKS] = pack;
      }
    }
  }
}

float q[GROUP][NK * VEC];
UNROLL
for (int g = 0; g < GROUP; ++g) {
  UNROLL
  for (int n = 0; n < NK; ++n) {
    const int pack = part + n * LANES;
    const int head = first_head + (g < num_heads ? g : 0);
    const size_t at = (row * HEADS + head) * KEY_PACKS;
    const int real = pack < KEY_PACKS ? pack : 0;
    quire::Pack loaded;
    if (ROTATE) {
      loaded = fresh[g * KEY_PACKS + real];
    } else {
      loaded = ((const DEVICE quire::Pack*)queries)[at + real];
    }
    quire::unpack<T>(loaded, q[g] + n * VEC);
    const float factor = pack < KEY_PACKS ? scale : 0.0f;
    UNROLL
    for (int e = 0; e < VEC; ++e) q[g][n * VEC + e] *= factor;
  }
}

// With EXTRA dimensions more, which lie in pages of their own and are not of the values.
float extra_q[XG][NX * VEC];
if (EXTRA > 0) {
  UNROLL
  for (int g = 0; g < GROUP; ++g) {
    UNROLL
    for (int n = 0; n < NX; ++n) {
      const int pack = part + n * LANES;
      const int head = first_head + quire::min(g, num_heads - 1);
      const size_t at = (row * HEADS + head) * EXTRA_PACKS + (pack < EXTRA_PACKS ? pack : 0);
      const int own = EXTRA > 0 ? g : 0;
      quire::unpack<T>(((const DEVICE quire::Pack*)extra_queries)[at], extra_q[own] + n * VEC);
      const float factor = pack < EXTRA_PACKS ? (SOFTCAP == 0 ? quire::LOG2_E : 1.0f) : 0.0f;
      UNROLL
      for (int e = 0; e < VEC; ++e) extra_q[own][n * VEC + e] *= factor;
    }
  }
}

float acc[GROUP][NV * VEC];
UNROLL
for (int g = 0; g < GROUP; ++g) {
  UNROLL
  for (int e = 0; e < NV * VEC; ++e) acc[g][e] = 0.0f;
}
float peak[OWNED], total[OWNED];
UNROLL
for (int j = 0; j < OWNED; ++j) {
  peak[j] = quire::HIDDEN;
  total[j] = 0.0f;
}

// Keys are loaded one tile ahead: while values are weighed, the next keys are on their way.
quire::Pack k[U * NK], v[U * NV], extra_k[XU * NX];
int blocks[BLOCKS];
int tile = (begin / TILE + simdgroup) * TILE;
if (tile < stop) {
  UNROLL
  for (int i = 0; i < BLOCKS; ++i) {
    const int index = quire::min(tile / BLOCK_SIZE + i, (stop - 1) / BLOCK_SIZE);
    blocks[i] = block_tables[table + index];
  }
  quire::load_tile<U, NK, LANES, KEY_PACKS, BLOCK_SIZE>(
      (const DEVICE quire::Pack*)key_pages, blocks, tile % BLOCK_SIZE, kv_head, KV_HEADS, lane, k);
  if (EXTRA > 0) {
    quire::load_tile<XU, NX, LANES, EXTRA_PACKS, BLOCK_SIZE>(
        (const DEVICE quire::Pack*)extra_pages, blocks, tile % BLOCK_SIZE, kv_head, KV_HEADS, lane, extra_k);
  }
}
for (; tile < stop; tile += SIMDGROUPS * TILE) {
  quire::load_tile<U, NV, LANES, VALUE_PACKS, BLOCK_SIZE>(
      (const DEVICE quire::Pack*)value_pages, blocks, tile % BLOCK_SIZE, kv_head, KV_HEADS, lane, v);
  const int next = tile + SIMDGROUPS * TILE;
  UNROLL
  for (int i = 0; i < BLOCKS; ++i) {
    const int index = quire::min(next / BLOCK_SIZE + i, (stop - 1) / BLOCK_SIZE);
    blocks[i] = block_tables[table + index];
  }

  float scores[U * GROUP];
  UNROLL
  for (int u = 0; u < U; ++u) {
    UNROLL
    for (int g = 0; g < GROUP; ++g) scores[u * GROUP + g] = 0.0f;
    UNROLL
    for (int n = 0; n < NK; ++n) {
      float key[VEC];
      quire::unpack<T>(k[u * NK + n], key);
      UNROLL
      for (int e = 0; e < VEC; ++e) {
        UNROLL
        for (int g = 0; g < GROUP; ++g) scores[u * GROUP + g] += q[g][n * VEC + e] * key[e];
      }
    }
    UNROLL
    for (int n = 0; n < (EXTRA > 0 ? NX : 0); ++n) {
      float key[VEC];
      quire::unpack<T>(extra_k[EXTRA > 0 ? u * NX + n : 0], key);
      UNROLL
      for (int e = 0; e < VEC; ++e) {
        UNROLL
        for (int g = 0; g < GROUP; ++g) {
          scores[u * GROUP + g] += extra_q[EXTRA > 0 ? g : 0][n * VEC + e] * key[e];
        }
      }
    }
  }
  if (next < stop) {
    quire::load_tile<U, NK, LANES, KEY_PACKS, BLOCK_SIZE>(
        (const DEVICE quire::Pack*)key_pages, blocks, next % BLOCK_SIZE, kv_head, KV_HEADS, lane, k);
    if (EXTRA > 0) {
      quire::load_tile<XU, NX, LANES, EXTRA_PACKS, BLOCK_SIZE>(
          (const DEVICE quire::Pack*)extra_pages, blocks, next % BLOCK_SIZE, kv_head, KV_HEADS, lane,
          extra_k);
    }
  }
  quire::ReduceScatter<U * GROUP, LANES / 2>::run(scores, lane);

  const int token = tile + own_key * KEYS + sub;
  const bool visible = token >= begin && token < stop;
  float rescale[OWNED];
  bool grew = false;
  UNROLL
  for (int j = 0; j < OWNED; ++j) {
    float score = scores[j];
    if (SOFTCAP != 0) score = softcap * quire::tanh(score / softcap) * quire::LOG2_E;
    score = visible ? score : quire::HIDDEN;
    float highest = score;
    UNROLL
    for (int mask = LANES / 2; mask >= KEY_LANES && mask > 0; mask /= 2) {
      highest = quire::max(highest, quire::shuffle_xor(highest, mask));
    }
    highest = quire::max(highest, peak[j]);
    grew = grew || highest > peak[j];
    rescale[j] = quire::exp2(peak[j] - highest);
    peak[j] = highest;
    scores[j] = visible ? quire::exp2(score - highest) : 0.0f;
    total[j] = total[j] * rescale[j] + scores[j];
  }
  if (quire::any(grew)) {
    UNROLL
    for (int g = 0; g < GROUP; ++g) {
      const int owner = sub * LANES + quire::owner_lane(g, GROUP, KEY_LANES);
      const float factor = quire::shuffle(rescale[g % OWNED], owner);
      UNROLL
      for (int e = 0; e < NV * VEC; ++e) acc[g][e] *= factor;
    }
  }
  if (tile < begin || next - (SIMDGROUPS - 1) * TILE > stop) {
    // Slots outside the stretch may hold anything, even NaN, which a weight of 0 does not hide.
    UNROLL
    for (int u = 0; u < U; ++u) {
      const int place = tile + u * KEYS + sub;
      UNROLL
      for (int i = 0; i < NV * 4; ++i) {
        if (place < begin || place >= stop) v[u * NV + i / 4].words[i % 4] = 0;
      }
    }
  }
  UNROLL
  for (int u = 0; u < U; ++u) {
    float weight[GROUP];
    UNROLL
    for (int g = 0; g < GROUP; ++g) {
      const int owner = sub * LANES + u * KEY_LANES + quire::owner_lane(g, GROUP, KEY_LANES);
      weight[g] = quire::shuffle(scores[g % OWNED], owner);
    }
    UNROLL
    for (int n = 0; n < NV; ++n) {
      float value[VEC];
      quire::unpack<T>(v[u * NV + n], value);
      UNROLL
      for (int e = 0; e < VEC; ++e) {
        UNROLL
        for (int g = 0; g < GROUP; ++g) acc[g][n * VEC + e] += weight[g] * value[e];
      }
    }
  }
}

// One result per query head of the simdgroup: gather each head's peak and total, then merge the
// lane groups that took different keys.
UNROLL
for (int j = 0; j < OWNED; ++j) {
  UNROLL
  for (int mask = LANES / 2; mask >= KEY_LANES && mask > 0; mask /= 2) {
    total[j] += quire::shuffle_xor(total[j], mask);
  }
}
float head_peak[GROUP], head_total[GROUP];
UNROLL
for (int g = 0; g < GROUP; ++g) {
  const int owner = sub * LANES + quire::owner_lane(g, GROUP, KEY_LANES);
  head_peak[g] = quire::shuffle(peak[g % OWNED], owner);
  head_total[g] = quire::shuffle(total[g % OWNED], owner);
  UNROLL
  for (int mask = LANES; mask < 32; mask *= 2) {
    const float highest = quire::max(head_peak[g], quire::shuffle_xor(head_peak[g], mask));
    const float factor = quire::exp2(head_peak[g] - highest);
    head_peak[g] = highest;
    head_total[g] *= factor;
    head_total[g] += quire::shuffle_xor(head_total[g], mask);
    UNROLL
    for (int e = 0; e < NV * VEC; ++e) {
      acc[g][e] *= factor;
      acc[g][e] += quire::shuffle_xor(acc[g][e], mask);
    }
  }
}

if (is_newest && simdgroup == 0) {
  UNROLL
  for (int g = 0; g < GROUP; ++g) {
    float score = 0.0f, key[VEC];
    UNROLL
    for (int n = 0; n < NK; ++n) {
      const int pack = part + n * LANES;
      quire::unpack<T>(fresh[GROUP * KEY_PACKS + (pack < KEY_PACKS ? pack : 0)], key);
      UNROLL
      for (int e = 0; e < VEC; ++e) score += q[g][n * VEC + e] * key[e];
    }
    UNROLL
    for (int mask = LANES / 2; mask > 0; mask /= 2) score += quire::shuffle_xor(score, mask);
    const float highest = quire::max(head_peak[g], score);
    const float keep = quire::exp2(head_peak[g] - highest);
    const float factor = quire::exp2(score - highest);
    head_peak[g] = highest;
    head_total[g] = head_total[g] * keep + factor;
    UNROLL
    for (int n = 0; n < NV; ++n) {
      const int pack = part + n * LANES;
      float value[VEC];
      quire::unpack<T>(fresh[(GROUP + 1) * KEY_PACKS + (pack < KEY_PACKS ? pack : 0)], value);
      UNROLL
      for (int e = 0; e < VEC; ++e) {
        acc[g][n * VEC + e] = acc[g][n * VEC + e] * keep + value[e] * factor;
      }
    }
  }
}

if (DIRECT) {
  // What the row shares with others, its first tokens, has been attended to in parts: each
  // simdgroup adds some of them to its own result.
  const int most_parts = int(shared_stats_shape[0]) / int(block_tables_shape[0]);
  for (int p = simdgroup; p < items[item * 4 + 3]; p += SIMDGROUPS) {
    UNROLL
    for (int g = 0; g < GROUP; ++g) {
      const int head = first_head + quire::min(g, num_heads - 1);
      const size_t at = size_t(row * most_parts + p) * HEADS + head;
      const float highest = quire::max(head_peak[g], shared_stats[at * 2]);
      const float keep = quire::exp2(head_peak[g] - highest);
      const float factor = quire::exp2(shared_stats[at * 2] - highest);
      head_peak[g] = highest;
      head_total[g] = head_total[g] * keep + shared_stats[at * 2 + 1] * factor;
      UNROLL
      for (int i = 0; i < NV * VEC / 4; ++i) {
        const int dim = (part + i / (VEC / 4) * LANES) * VEC + i % (VEC / 4) * 4;
        float values[4];
        quire::unpack<float>(
            ((const DEVICE quire::Pack*)shared_partials)[(at * DV + (dim < DV ? dim : 0)) / 4], values);
        UNROLL
        for (int e = 0; e < 4; ++e) acc[g][i * 4 + e] = acc[g][i * 4 + e] * keep + values[e] * factor;
      }
    }
  }
}

// Merge the simdgroups, as many heads at a time as fit in shared memory.
constexpr int FITTING = 16384 / (4 * DV * SIMDGROUPS);
constexpr int CHUNK = FITTING < 1 ? 1 : FITTING < GROUP ? FITTING : GROUP;
SHARED float group_stats[SIMDGROUPS * GROUP * 2];
SHARED float shared_acc[SIMDGROUPS * CHUNK * DV];
if (lane == 0) {
  UNROLL
  for (int g = 0; g < GROUP; ++g) {
    group_stats[(simdgroup * GROUP + g) * 2] = head_peak[g];
    group_stats[(simdgroup * GROUP + g) * 2 + 1] = head_total[g];
  }
}
BARRIER();
UNROLL
for (int base = 0; base < GROUP; base += CHUNK) {
  UNROLL
  for (int c = 0; c < CHUNK; ++c) {
    const int g = base + c < GROUP ? base + c : GROUP - 1;
    float highest = quire::HIDDEN;
    UNROLL
    for (int s = 0; s < SIMDGROUPS; ++s) {
      highest = quire::max(highest, group_stats[(s * GROUP + g) * 2]);
    }
    const float factor = quire::exp2(head_peak[g] - highest);
    if (sub == 0) {
      UNROLL
      for (int n = 0; n < NV; ++n) {
        const int pack = part + n * LANES;
        if (pack < VALUE_PACKS) {
          UNROLL
          for (int e = 0; e < VEC; ++e) {
            shared_acc[(simdgroup * CHUNK + c) * DV + pack * VEC + e] = acc[g][n * VEC + e] * factor;
          }
        }
      }
    }
  }
  BARRIER();
  for (int i = int(thread_index_in_threadgroup); i < CHUNK * DV; i += SIMDGROUPS * 32) {
    const int g = base + i / DV;
    if (g >= num_heads) continue;
    const int head = first_head + g;
    float highest = quire::HIDDEN, sum = 0.0f, weight = 0.0f;
    UNROLL
    for (int s = 0; s < SIMDGROUPS; ++s) {
      highest = quire::max(highest, group_stats[(s * GROUP + g) * 2]);
      sum += shared_acc[s * CHUNK * DV + i];
    }
    UNROLL
    for (int s = 0; s < SIMDGROUPS; ++s) {
      weight += group_stats[(s * GROUP + g) * 2 + 1] *
          quire::exp2(group_stats[(s * GROUP + g) * 2] - highest);
    }
    if (DIRECT) {
      if (HAS_SINKS) {
        const float sink = float(sinks[head]) * quire::LOG2_E;
        const float top = quire::max(highest, sink);
        sum *= quire::exp2(highest - top);
        weight = weight * quire::exp2(highest - top) + quire::exp2(sink - top);
      }
      output[(row * HEADS + head) * DV + i % DV] = OUT(weight > 0.0f ? sum / weight : 0.0f);
    } else {
      output[(item * HEADS + head) * DV + i % DV] = OUT(sum);
      if (i % DV == 0) {
        stats[(item * HEADS + head) * 2] = highest;
        stats[(item * HEADS + head) * 2 + 1] = weight;
      }
    }
  }
  if (base + CHUNK < GROUP) BARRIER();
}
