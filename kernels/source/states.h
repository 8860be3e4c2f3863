// Rows of a recurrent state, spread over lanes.

namespace quire {

template <typename T>
struct alignas(4 * sizeof(T)) Fours {
  T values[4];
};

// Values of a row of N that the LANES lanes which share it have each: fours, taken in turns, so that
// neighbours read neighbouring packs of a state, which is nearly all that is read.
template <typename T, int N, int LANES>
struct Share {
  enum { FOURS = N / (LANES * 4), SIZE = N / LANES };

  static FUNC void read(SHARED_POINTER(const Fours<T>) row, int lane, THREAD float* values) {
    UNROLL
    for (int i = 0; i < FOURS; ++i) {
      const Fours<T> four = row[place(i, lane)];
      UNROLL
      for (int e = 0; e < 4; ++e) values[4 * i + e] = float(four.values[e]);
    }
  }

  // The same places of a row of float32.
  static FUNC void load_floats(const DEVICE float* row, int lane, THREAD float* values) {
    UNROLL
    for (int i = 0; i < FOURS; ++i) {
      unpack<float>(((const DEVICE Pack*)row)[place(i, lane)], values + 4 * i);
    }
  }

  static FUNC void store_floats(DEVICE float* row, int lane, THREAD const float* values) {
    UNROLL
    for (int i = 0; i < FOURS; ++i) {
      ((DEVICE Pack*)row)[place(i, lane)] = pack<float>(values + 4 * i);
    }
  }

  // Four sums side by side: one alone would wait for each of its additions.
  static FUNC float product(THREAD const float* a, THREAD const float* b) {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    UNROLL
    for (int i = 0; i < SIZE; ++i) sums[i % 4] += a[i] * b[i];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  static FUNC int place(int i, int lane) { return i * LANES + lane; }
};

// As many rows of a step as a threadgroup copies at a time, each in so many fours.
constexpr int tile_rows(int fours, int threads) {
  const int rows = LOADS_UNDER_WAY * threads / fours;
  return rows < 1 ? 1 : rows > 16 ? 16 : rows;
}

// Rows of N values on their way into threadgroup memory, by all of its threads. All loads of a tile
// begin before the first is waited for.
template <typename T, int N, int TILE, int THREADS>
struct Staged {
  enum { EACH = (TILE * N + THREADS - 1) / THREADS };

  // The first `width` values of `count` rows, which are `stride` values apart.
  static FUNC void load(
      THREAD T* held, const DEVICE T* rows, int stride, int count, int width, int own) {
    UNROLL
    for (int n = 0; n < EACH; ++n) {
      const int row = (n * THREADS + own) / N;
      const int column = (n * THREADS + own) % N;
      if (row < count && column < width) held[n] = rows[size_t(row) * stride + column];
    }
  }

  static FUNC void store(
      SHARED_POINTER(T) tile, THREAD const T* held, int count, int width, int own) {
    UNROLL
    for (int n = 0; n < EACH; ++n) {
      const int i = n * THREADS + own;
      if (i / N < count && i % N < width) tile[i] = held[n];
    }
  }
};

// What is left of a state for a gated delta net's `x`, a sum: e^(-e^a_log softplus(x)). T rounds where
// MLX's operations do.
template <typename T>
FUNC float left_of(float x, float a_log) {
  x = float(T(x));
  const float small = exp2(-max(x, -x) * LOG2_E);
  // 1 + small loses a smaller one, whose logarithm a few terms of its series give.
  const float series = small * (1.0f - small * (0.5f - small * (1.0f / 3.0f - small * 0.25f)));
  const float log = small < 0.03f ? series : log2(1.0f + small) / LOG2_E;
  return exp2(-exp2(a_log * LOG2_E) * LOG2_E * float(T(max(x, 0.0f) + log)));
}

template <int LANES>
FUNC float sum_over(float x) {
  UNROLL
  for (int mask = LANES / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

} // namespace quire
