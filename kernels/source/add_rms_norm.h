// A residual addition and the RMS norm of its result. A threadgroup takes one row.

constexpr int VEC = 16 / sizeof(T);
constexpr int PACKS = DIM / VEC;
constexpr int NP = quire::ceil_div(PACKS, SIMDGROUPS * 32);
const int place = int(thread_index_in_threadgroup);
const size_t row = size_t(threadgroup_position_in_grid.x) * PACKS;

float values[NP * VEC];
float squares = 0.0f;
UNROLL
for (int n = 0; n < NP; ++n) {
  const int at = place + n * SIMDGROUPS * 32;
  if (at < PACKS) {
    float other[VEC];
    quire::unpack<T>(((const DEVICE quire::Pack*)x)[row + at], values + n * VEC);
    quire::unpack<T>(((const DEVICE quire::Pack*)delta)[row + at], other);
    UNROLL
    for (int e = 0; e < VEC; ++e) values[n * VEC + e] += other[e];
    const quire::Pack rounded = quire::pack<T>(values + n * VEC);
    ((DEVICE quire::Pack*)sum)[row + at] = rounded;
    quire::unpack<T>(rounded, values + n * VEC);
    UNROLL
    for (int e = 0; e < VEC; ++e) squares += values[n * VEC + e] * values[n * VEC + e];
  }
}
SHARED float parts[SIMDGROUPS];
squares = quire::simd_sum(squares);
if (thread_index_in_simdgroup == 0) parts[simdgroup_index_in_threadgroup] = squares;
BARRIER();
float total = 0.0f;
UNROLL
for (int s = 0; s < SIMDGROUPS; ++s) total += parts[s];
const float factor = quire::rsqrt(total / float(DIM) + quire::as_float(EPS));
UNROLL
for (int n = 0; n < NP; ++n) {
  const int at = place + n * SIMDGROUPS * 32;
  if (at < PACKS) {
    float scale[VEC];
    quire::unpack<T>(((const DEVICE quire::Pack*)weight)[at], scale);
    UNROLL
    for (int e = 0; e < VEC; ++e) values[n * VEC + e] *= factor * scale[e];
    ((DEVICE quire::Pack*)normed)[row + at] = quire::pack<T>(values + n * VEC);
  }
}
