// Rows of a recurrent state, spread over lanes.

namespace quire {

// Values of a row of N that the LANES lanes which share it have each: fours, taken in turns, so that
// neighbours read neighbouring packs of a state, which is nearly all that is read.
template <typename T, int N, int LANES>
struct Share {
  enum { FOURS = N / (LANES * 4), SIZE = N / LANES };

  static FUNC void load(const DEVICE T* row, int lane, THREAD Packed<T, 4>* fours) {
    UNROLL
    for (int i = 0; i < FOURS; ++i) fours[i] = ((const DEVICE Packed<T, 4>*)row)[place(i, lane)];
  }

  static FUNC void unpacked(THREAD const Packed<T, 4>* fours, THREAD float* values) {
    UNROLL
    for (int i = 0; i < SIZE; ++i) values[i] = float(fours[i / 4].values[i % 4]);
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

template <int LANES>
FUNC float sum_over(float x) {
  UNROLL
  for (int mask = LANES / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

} // namespace quire
