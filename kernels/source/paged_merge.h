// Merges the partial results of a row's work items, and of the parts of its context that it shares
// with other rows; a threadgroup takes one row and head.

constexpr int PACKS = DV / 4;
constexpr int NP = quire::ceil_div(PACKS, 32);
const int row = int(threadgroup_position_in_grid.x) / HEADS;
const int head = int(threadgroup_position_in_grid.x) % HEADS;
const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);
const int begin = first_items[row];
const int own = first_items[row + 1] - begin;
const int most_parts = int(shared_stats_shape[0]) / int(first_items_shape[0] - 1);
const int count = own + (MAY_SHARE && own > 0 ? items[begin * 4 + 3] : 0);
const size_t first = size_t(begin) * HEADS + head;
const size_t first_shared = size_t(row) * most_parts * HEADS + head;

float highest = HAS_SINKS ? float(sinks[head]) * quire::LOG2_E : quire::HIDDEN;
for (int i = lane; i < count; i += 32) {
  const float peak = i < own ? stats[(first + i * HEADS) * 2]
                             : shared_stats[(first_shared + (i - own) * HEADS) * 2];
  highest = quire::max(highest, peak);
}
UNROLL
for (int mask = 16; mask > 0; mask /= 2) {
  highest = quire::max(highest, quire::shuffle_xor(highest, mask));
}
float weight = 0.0f;
for (int i = lane; i < count; i += 32) {
  const size_t at = (i < own ? first + i * HEADS : first_shared + (i - own) * HEADS) * 2;
  const float peak = i < own ? stats[at] : shared_stats[at];
  const float total = i < own ? stats[at + 1] : shared_stats[at + 1];
  weight += total * quire::exp2(peak - highest);
}
UNROLL
for (int mask = 16; mask > 0; mask /= 2) weight += quire::shuffle_xor(weight, mask);
if (HAS_SINKS) weight += quire::exp2(float(sinks[head]) * quire::LOG2_E - highest);

float acc[NP * 4];
UNROLL
for (int e = 0; e < NP * 4; ++e) acc[e] = 0.0f;
for (int i = simdgroup; i < count; i += SIMDGROUPS) {
  const size_t at = i < own ? first + i * HEADS : first_shared + (i - own) * HEADS;
  const float peak = i < own ? stats[at * 2] : shared_stats[at * 2];
  const float factor = quire::exp2(peak - highest);
  UNROLL
  for (int n = 0; n < NP; ++n) {
    const int pack = lane + 32 * n;
    const size_t place = at * PACKS + (pack < PACKS ? pack : 0);
    quire::Pack loaded;
    if (i < own) {
      loaded = ((const DEVICE quire::Pack*)partials)[place];
    } else {
      loaded = ((const DEVICE quire::Pack*)shared_partials)[place];
    }
    float values[4];
    quire::unpack<float>(loaded, values);
    UNROLL
    for (int e = 0; e < 4; ++e) acc[n * 4 + e] += values[e] * factor;
  }
}
SHARED float shared_acc[SIMDGROUPS * DV];
UNROLL
for (int n = 0; n < NP; ++n) {
  const int pack = lane + 32 * n;
  if (pack < PACKS) {
    UNROLL
    for (int e = 0; e < 4; ++e) shared_acc[simdgroup * DV + pack * 4 + e] = acc[n * 4 + e];
  }
}
BARRIER();
for (int d = int(thread_index_in_threadgroup); d < DV; d += SIMDGROUPS * 32) {
  float sum = 0.0f;
  UNROLL
  for (int s = 0; s < SIMDGROUPS; ++s) sum += shared_acc[s * DV + d];
  output[size_t(threadgroup_position_in_grid.x) * DV + d] = T(weight > 0.0f ? sum / weight : 0.0f);
}
