// Rows of a recurrent state, spread over lanes.

namespace quire {

// Values of a row of N that the LANES lanes which share it have each: packs of type T, taken in
// turns, so that neighbours read neighbouring packs.
template <typename T, int N, int LANES>
struct Share {
  enum { VEC = 16 / sizeof(T), PACKS = N / (LANES * VEC), SIZE = N / LANES };

  static FUNC void load(const DEVICE T* row, int lane, THREAD Pack* packs) {
    UNROLL
    for (int p = 0; p < PACKS; ++p) packs[p] = ((const DEVICE Pack*)row)[p * LANES + lane];
  }

  static FUNC void unpacked(THREAD const Pack* packs, THREAD float* values) {
    UNROLL
    for (int p = 0; p < PACKS; ++p) unpack<T>(packs[p], values + p * VEC);
  }

  // The same places of a row of float32.
  static FUNC void load_floats(const DEVICE float* row, int lane, THREAD float* values) {
    UNROLL
    for (int i = 0; i < SIZE / 4; ++i) {
      unpack<float>(((const DEVICE Pack*)row)[place(i, lane)], values + 4 * i);
    }
  }

  static FUNC void store_floats(DEVICE float* row, int lane, THREAD const float* values) {
    UNROLL
    for (int i = 0; i < SIZE / 4; ++i) {
      ((DEVICE Pack*)row)[place(i, lane)] = pack<float>(values + 4 * i);
    }
  }

  static FUNC int place(int i, int lane) {
    return (i / (VEC / 4) * LANES + lane) * (VEC / 4) + i % (VEC / 4);
  }
};

template <int LANES>
FUNC float sum_over(float x) {
  UNROLL
  for (int mask = LANES / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

} // namespace quire
