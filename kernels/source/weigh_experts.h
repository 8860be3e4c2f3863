// What a row's experts gave, weighed and summed, and what its shared expert gave on top. One thread
// takes one pack of a row.

constexpr int VEC = 16 / sizeof(T);
constexpr int PACKS = DIM / VEC;
const int index = int(threadgroup_position_in_grid.x) * THREADS + int(thread_index_in_threadgroup);
const int row = index / PACKS;
const int place = index % PACKS;
if (row < int(weights_shape[0])) {
  float sums[VEC], values[VEC];
  UNROLL
  for (int e = 0; e < VEC; ++e) sums[e] = 0.0f;
  UNROLL
  for (int n = 0; n < CHOSEN; ++n) {
    const size_t pair = size_t(row) * CHOSEN + n;
    const float weight = float(weights[pair]);
    const size_t source = SORTED ? size_t(places[pair]) : pair;
    quire::unpack<T>(((const DEVICE quire::Pack*)pairs)[source * PACKS + place], values);
    UNROLL
    for (int e = 0; e < VEC; ++e) sums[e] += weight * values[e];
  }
  if (SHARED_EXPERT) {
    // exp2 of a large number is infinite, and the quotient the 0 that it should be.
    const float gate = GATED ? 1.0f / (1.0f + quire::exp2(-float(gates[row]) * quire::LOG2_E)) : 1.0f;
    quire::unpack<T>(((const DEVICE quire::Pack*)common)[size_t(row) * PACKS + place], values);
    UNROLL
    for (int e = 0; e < VEC; ++e) sums[e] += gate * values[e];
  }
  ((DEVICE quire::Pack*)output)[size_t(row) * PACKS + place] = quire::pack<T>(sums);
}
