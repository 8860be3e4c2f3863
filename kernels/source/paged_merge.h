// Merges the partial results of a row's work items; a threadgroup takes one row and head.

constexpr int PACKS = DV / 4;
constexpr int NP = quire::ceil_div(PACKS, 32);
const int row = int(threadgroup_position_in_grid.x) / HEADS;
const int head = int(threadgroup_position_in_grid.x) % HEADS;
const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);
const int begin = first_items[row];
const int end = first_items[row + 1];

float highest = HAS_SINKS ? float(sinks[head]) * quire::LOG2_E : quire::HIDDEN;
for (int item = begin + lane; item < end; item += 32) {
  highest = quire::max(highest, stats[(size_t(item) * HEADS + head) * 2]);
}
UNROLL
for (int mask = 16; mask > 0; mask /= 2) {
  highest = quire::max(highest, quire::shuffle_xor(highest, mask));
}
float weight = 0.0f;
for (int item = begin + lane; item < end; item += 32) {
  const size_t at = (size_t(item) * HEADS + head) * 2;
  weight += stats[at + 1] * quire::exp2(stats[at] - highest);
}
UNROLL
for (int mask = 16; mask > 0; mask /= 2) weight += quire::shuffle_xor(weight, mask);
if (HAS_SINKS) weight += quire::exp2(float(sinks[head]) * quire::LOG2_E - highest);

float acc[NP * 4];
UNROLL
for (int e = 0; e < NP * 4; ++e) acc[e] = 0.0f;
for (int item = begin + simdgroup; item < end; item += SIMDGROUPS) {
  const size_t at = size_t(item) * HEADS + head;
  const float factor = quire::exp2(stats[at * 2] - highest);
  UNROLL
  for (int n = 0; n < NP; ++n) {
    const int pack = lane + 32 * n;
    const quire::Pack loaded =
        ((const DEVICE quire::Pack*)partials)[at * PACKS + (pack < PACKS ? pack : 0)];
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
