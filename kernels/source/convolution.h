// A convolution of K rows, in a pack of channels.

namespace quire {

template <typename T, int K>
struct Window {
  enum { VEC = 16 / sizeof(T) };

  // The oldest row stands first and goes.
  static FUNC void push(THREAD float* rows, Pack row) {
    UNROLL
    for (int i = 0; i < (K - 1) * VEC; ++i) rows[i] = rows[i + VEC];
    unpack<T>(row, rows + (K - 1) * VEC);
  }

  // Rounded wherever MLX's operations round.
  static FUNC Pack apply(
      THREAD const float* rows, THREAD const float* weights, THREAD const float* biases,
      bool has_bias, bool silu) {
    float sums[VEC];
    UNROLL
    for (int e = 0; e < VEC; ++e) {
      float sum = 0.0f;
      UNROLL
      for (int i = 0; i < K; ++i) sum += rows[i * VEC + e] * weights[i * VEC + e];
      if (has_bias) sum = float(T(float(T(sum)) + biases[e]));
      if (silu) {
        sum = float(T(sum));
        sum *= float(T(1.0f / (1.0f + exp2(-sum * LOG2_E))));
      }
      sums[e] = sum;
    }
    return pack<T>(sums);
  }
};

// Heads of which each of LANES neighbours has a pack.
template <typename T, int LANES>
struct NormedHeads {
  enum { VEC = 16 / sizeof(T) };

  // By its length, rounded where MLX's operations round; all neighbours call it, `is_normed` or not.
  static FUNC Pack normed(Pack row, bool is_normed, float eps, float scale) {
    float values[VEC];
    unpack<T>(row, values);
    float sum = 0.0f;
    UNROLL
    for (int e = 0; e < VEC; ++e) sum += values[e] * values[e];
    const float factor = rsqrt(sum_over<LANES>(sum) / (LANES * VEC) + eps);
    if (!is_normed) return row;
    UNROLL
    for (int e = 0; e < VEC; ++e) values[e] = float(T(values[e] * factor)) * float(T(scale));
    return pack<T>(values);
  }
};

} // namespace quire
