// silu(gate) * up, of rows that hold both side by side. One thread takes one pack.

constexpr int VEC = 16 / sizeof(T);
constexpr int PACKS = DIM / VEC;
const int index = int(threadgroup_position_in_grid.x) * THREADS + int(thread_index_in_threadgroup);
const int row = index / PACKS;
const int pack = index % PACKS;
if (row < int(both_shape[0])) {
  const size_t at = size_t(row) * 2 * PACKS + pack;
  float gate[VEC], up[VEC];
  quire::unpack<T>(((const DEVICE quire::Pack*)both)[at], gate);
  quire::unpack<T>(((const DEVICE quire::Pack*)both)[at + PACKS], up);
  UNROLL
  for (int e = 0; e < VEC; ++e) {
    // exp2 of a large number is infinite, and the quotient the 0 that it should be.
    gate[e] *= up[e] / (1.0f + quire::exp2(-gate[e] * quire::LOG2_E));
  }
  ((DEVICE quire::Pack*)output)[size_t(row) * PACKS + pack] = quire::pack<T>(gate);
}
