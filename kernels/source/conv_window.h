// Convolutions of K rows in each channel, over segments of rows. One thread takes a pack of
// channels, either of the first K - 1 rows of a sequence, which see its old tail, and of all its
// new tails; or of TILE rows, as far as they see only rows of this step. So nobody reads a tail
// that another thread writes. The pool is an input, so MLX believes it is only read: whoever uses
// it next takes `new_fence` as an input.
// If KEY_PACKS is not 0, the result are three arrays, one behind the other: so many packs of a row
// are queries, as many keys, and the rest values. Queries and keys are normed, head by head, by the
// HEAD_LANES neighbours that have one.

constexpr int VEC = 16 / sizeof(T);
constexpr int KEPT = K - 1;
constexpr int PACKS = CHANNELS / VEC;
typedef quire::Window<T, K> Window;
typedef quire::NormedHeads<T, HEAD_LANES> Heads;
const int place = int(threadgroup_position_in_grid.x) * THREADS + int(thread_index_in_threadgroup);
const int num_segments = int(sources_shape[0]);
const int index = int(threadgroup_position_in_grid.y);
if (index == 0 && place == 0) new_fence[0] = 1;
if (place >= PACKS) return;

// In packs: value by value, a warp would read the same lines K * VEC times.
float loaded[K * VEC], weights[K * VEC], biases[VEC];
UNROLL
for (int i = 0; i < K; ++i) {
  quire::unpack<T>(((const DEVICE quire::Pack*)weight)[place * K + i], loaded + i * VEC);
}
UNROLL
for (int e = 0; e < VEC; ++e) {
  UNROLL
  for (int i = 0; i < K; ++i) weights[i * VEC + e] = loaded[e * K + i];
  biases[e] = HAS_BIAS ? float(bias[place * VEC + e]) : 0.0f;
}
const bool is_normed = place < 2 * KEY_PACKS;
const int part = KEY_PACKS == 0 || place < KEY_PACKS ? 0 : is_normed ? KEY_PACKS : 2 * KEY_PACKS;
const int width = KEY_PACKS == 0 ? PACKS : is_normed ? KEY_PACKS : PACKS - 2 * KEY_PACKS;
const float scale = quire::as_float(part == 0 ? QUERY_SCALE : KEY_SCALE);
const DEVICE quire::Pack* rows = (const DEVICE quire::Pack*)x + place;
DEVICE quire::Pack* results =
    (DEVICE quire::Pack*)y + size_t(part) * int(x_shape[0]) + (place - part);
DEVICE quire::Pack* tails = (DEVICE quire::Pack*)pool + place;
float window[K * VEC];

if (index < num_segments) {
  int segment = index;
  // All at once: each of them takes as long to come as a row.
  const int source = sources[segment];
  const int begin = starts[segment];
  int end = starts[segment + 1];
  int target = targets[segment];
  if (source < 0) return; // it is taken with the one before
  UNROLL
  for (int i = 0; i < K * VEC; ++i) window[i] = 0.0f;
  if (source > 0) {
    UNROLL
    for (int i = 0; i < KEPT; ++i) {
      Window::push(window, tails[(size_t(source) * KEPT + i) * PACKS]);
    }
  }
  int row = begin;
  bool goes_on = true;
  while (goes_on) {
    for (; row < end && row < begin + KEPT; ++row) {
      Window::push(window, rows[size_t(row) * PACKS]);
      quire::Pack found = Window::apply(window, weights, biases, HAS_BIAS, SILU);
      if (KEY_PACKS > 0) found = Heads::normed(found, is_normed, quire::as_float(EPS), scale);
      results[size_t(row) * width] = found;
    }
    if (target > 0) {
      UNROLL
      for (int i = 0; i < KEPT; ++i) {
        quire::Pack kept = quire::pack<T>(window + (i + 1) * VEC);
        if (end - begin >= KEPT) kept = rows[size_t(end - KEPT + i) * PACKS];
        tails[(size_t(target) * KEPT + i) * PACKS] = kept;
      }
    }
    ++segment;
    goes_on = segment < num_segments && sources[segment] < 0;
    if (goes_on) {
      end = starts[segment + 1];
      target = targets[segment];
    }
  }
} else {
  const int first = (index - num_segments) * TILE;
  const int stop = quire::min(first + TILE, int(x_shape[0]));
  int segment = 0; // the last one that starts there or before
  int after = num_segments;
  while (after - segment > 1) {
    const int middle = (segment + after) / 2;
    if (starts[middle] <= first) {
      segment = middle;
    } else {
      after = middle;
    }
  }
  int origin = segment;
  while (sources[origin] < 0) --origin;
  int begin = starts[origin];
  bool is_filled = false;
  for (int row = first; row < stop; ++row) {
    while (segment + 1 < num_segments && starts[segment + 1] <= row) {
      ++segment;
      if (sources[segment] >= 0) begin = starts[segment];
    }
    if (row >= starts[num_segments]) {
      const quire::Pack zeros = {{0, 0, 0, 0}};
      results[size_t(row) * width] = zeros;
    } else if (row >= begin + KEPT) {
      for (int i = is_filled ? KEPT : 0; i < K; ++i) {
        Window::push(window, rows[size_t(row - KEPT + i) * PACKS]);
      }
      quire::Pack found = Window::apply(window, weights, biases, HAS_BIAS, SILU);
      if (KEY_PACKS > 0) found = Heads::normed(found, is_normed, quire::as_float(EPS), scale);
      results[size_t(row) * width] = found;
      is_filled = true;
    } else {
      is_filled = false;
    }
  }
}
