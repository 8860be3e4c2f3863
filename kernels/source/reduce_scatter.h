// Sums over lanes that leave each lane a part of the results.

namespace quire {

// Sums over groups of 2 * MASK lanes, of N values each. As long as N is even a lane keeps half of
// the values and hands on the other half, so that the sums end up spread over the lanes: N shuffles
// in all instead of N * log2(lanes), and each sum is then worked on once, not in every lane.
template <int N, int MASK>
struct ReduceScatter {
  static FUNC void run(THREAD float* v, int lane) {
    if (N % 2 == 0) {
      const bool upper = (lane & MASK) != 0;
      UNROLL
      for (int i = 0; i < N / 2; ++i) {
        const float sent = upper ? v[i] : v[i + N / 2];
        v[i] = (upper ? v[i + N / 2] : v[i]) + shuffle_xor(sent, MASK);
      }
    } else {
      UNROLL
      for (int i = 0; i < N; ++i) v[i] += shuffle_xor(v[i], MASK);
    }
    ReduceScatter<(N % 2 == 0 ? N / 2 : N), MASK / 2>::run(v, lane);
  }
};

template <int N>
struct ReduceScatter<N, 0> {
  static FUNC void run(THREAD float*, int) {}
};

// Where ReduceScatter leaves value `index` of N: the lane of its group, and the place there.
constexpr int owner_lane(int index, int n, int lanes) {
  int lane = 0;
  for (int bit = lanes / 2; bit > 0; bit /= 2) {
    if (n % 2 == 0) {
      n /= 2;
      if (index >= n) {
        lane += bit;
        index -= n;
      }
    }
  }
  return lane;
}

constexpr int owned_count(int n, int lanes) {
  for (int bit = lanes / 2; bit > 0; bit /= 2) {
    if (n % 2 == 0) n /= 2;
  }
  return n;
}

} // namespace quire
