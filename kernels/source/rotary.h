// One head of a row, spread over a simdgroup: its RMS norm and its rotary embedding.

namespace quire {

// The first ROTARY of D values are turned in pairs: halves of them, or neighbours if TRADITIONAL.
template <typename T, int D, int ROTARY, bool TRADITIONAL>
struct RotaryHead {
  // First and second values of this lane's pairs in turn, then those beyond ROTARY.
  float values[2 * ceil_div(ROTARY / 2, 32) + ceil_div(D - ROTARY, 32)];

  static constexpr FUNC int count() { return 2 * ceil_div(ROTARY / 2, 32) + ceil_div(D - ROTARY, 32); }

  // Which of the head's values this lane's `n` is; D if it is none.
  static FUNC int place(int n, int lane) {
    constexpr int PAIRS = 2 * ceil_div(ROTARY / 2, 32);
    const int pair = lane + 32 * (n / 2);
    if (n >= PAIRS) return min(ROTARY + lane + 32 * (n - PAIRS), D);
    if (pair >= ROTARY / 2) return D;
    return TRADITIONAL ? 2 * pair + n % 2 : pair + n % 2 * (ROTARY / 2);
  }

  FUNC void load(const DEVICE T* head, int lane) {
    UNROLL
    for (int n = 0; n < count(); ++n) {
      const int at = place(n, lane);
      values[n] = at < D ? float(head[at]) : 0.0f;
    }
  }

  // Rounded to T, as by a norm of its own.
  template <typename Weights>
  FUNC void norm(Weights weights, float eps, int lane) {
    float squares = 0.0f;
    UNROLL
    for (int n = 0; n < count(); ++n) squares += values[n] * values[n];
    const float factor = rsqrt(simd_sum(squares) / float(D) + eps);
    UNROLL
    for (int n = 0; n < count(); ++n) {
      const int at = min(place(n, lane), D - 1);
      values[n] = float(T(values[n] * factor * float(weights[at])));
    }
  }

  // Those that are turned, rounded to T, as by a product of its own.
  FUNC void scale(float factor) {
    UNROLL
    for (int n = 0; n < 2 * ceil_div(ROTARY / 2, 32); ++n) values[n] = float(T(values[n] * factor));
  }

  // By the position times each pair's frequency, in radians.
  template <typename Frequencies>
  FUNC void rotate(float position, Frequencies inverse_frequencies, int lane) {
    UNROLL
    for (int n = 0; n < ceil_div(ROTARY / 2, 32); ++n) {
      const float angle = position * inverse_frequencies[min(lane + 32 * n, ROTARY / 2 - 1)];
      const float cosine = cos(angle), sine = sin(angle);
      const float first = values[2 * n], second = values[2 * n + 1];
      values[2 * n] = first * cosine - second * sine;
      values[2 * n + 1] = first * sine + second * cosine;
    }
  }
};

} // namespace quire
