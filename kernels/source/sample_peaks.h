// The first of three kernels that draw one token of each row; kernels/draws.py tells what is drawn
// and how tokens are weighed. A row is cut into stretches, and a threadgroup takes one of them.
// Here: the likeliest token of each stretch, the first of equals.

constexpr int SIMDGROUPS = THREADS / 32; // a power of two
constexpr int PACKS = VOCAB / WIDTH;
constexpr int LOADS = WIDTH < 8 ? 4 : 2; // under way at once

SHARED float peak_of[SIMDGROUPS];
SHARED unsigned place_of[SIMDGROUPS];

const int stretch = int(threadgroup_position_in_grid.x);
const int row = int(threadgroup_position_in_grid.y);
const int index = int(thread_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int stretches = int(parameters[row * 8 + 5]);
const int span = quire::ceil_div(PACKS, stretches);
const int begin = stretch * span;
const int end = quire::min(begin + span, PACKS);
const DEVICE quire::Packed<T, WIDTH>* packs =
    (const DEVICE quire::Packed<T, WIDTH>*)logits + size_t(row) * PACKS;

quire::Best best = {quire::LOWEST, 0};
for (int base = begin + index; base < end; base += THREADS * LOADS) {
  quire::Packed<T, WIDTH> loaded[LOADS];
  UNROLL
  for (int u = 0; u < LOADS; ++u) loaded[u] = packs[quire::min(base + THREADS * u, end - 1)];
  UNROLL
  for (int u = 0; u < LOADS; ++u) {
    if (base + THREADS * u < end) {
      UNROLL
      for (int e = 0; e < WIDTH; ++e) {
        const float logit = float(loaded[u].values[e]);
        if (logit > best.peak) {
          best.peak = logit;
          best.place = unsigned((base + THREADS * u) * WIDTH + e);
        }
      }
    }
  }
}
best = quire::best_of_lanes(best, lane);
if (lane == 0) {
  peak_of[simdgroup_index_in_threadgroup] = best.peak;
  place_of[simdgroup_index_in_threadgroup] = best.place;
}
BARRIER();
best.peak = peak_of[lane % SIMDGROUPS];
best.place = place_of[lane % SIMDGROUPS];
best = quire::best_of_lanes(best, lane);
if (index == 0) {
  peaks[row * stretches + stretch] = best.peak;
  places[row * stretches + stretch] = best.place;
}
if (stretch == 0 && index < 8) state[row * 8 + index] = 0;
