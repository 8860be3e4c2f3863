// Weights of tokens, and sums of them that do not depend on an order.

namespace quire {

// 64 bits on both devices.
typedef unsigned long Wide;

FUNC Wide shuffle(Wide x, int lane) {
  return (Wide(shuffle(unsigned(x >> 32), lane)) << 32) | Wide(shuffle(unsigned(x), lane));
}

// The sum of x over this lane and those below.
FUNC Wide inclusive_sum(Wide x, int lane) {
  UNROLL
  for (int step = 1; step < 32; step *= 2) {
    const Wide below = shuffle(x, lane < step ? lane : lane - step);
    if (lane >= step) x += below;
  }
  return x;
}

CONSTANT float LOWEST = -3.4e38f;

FUNC float highest_of_lanes(float x) {
  UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x = max(x, shuffle_xor(x, mask));
  return x;
}

// A token and its logit.
struct Best {
  float peak;
  unsigned place;
};

// The likeliest of all lanes, the first of equals.
FUNC Best best_of_lanes(Best best, int lane) {
  UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    const float peak = shuffle_xor(best.peak, mask);
    const unsigned place = shuffle(best.place, lane ^ mask);
    if (peak > best.peak || (peak == best.peak && place < best.place)) {
      best.peak = peak;
      best.place = place;
    }
  }
  return best;
}

// How sampling weighs tokens: kernels/sampling_reference.py does the same. A token of 2**-y times
// the likeliest one's probability has the key y * 2**24, and from y = 64 on the key NEVER.
CONSTANT unsigned NEVER = 1u << 30;

FUNC unsigned sampling_key(float y) { return y < 64.0f ? unsigned(y * 16777216.0f) : NEVER; }

// 2**-y, of which 2**24 is one, without the integer part of y.
FUNC unsigned mantissa_of_key(unsigned key) {
  return unsigned(exp2(-float(key & 0xffffffu) / 16777216.0f) * 16777216.0f);
}

// 2**-y, of which 2**40 is one.
FUNC Wide weight_of_key(unsigned key) { return (Wide(mantissa_of_key(key)) << 16) >> (key >> 24); }

// total * part, rounded down, for 0 <= part < 1 and a total below 2**60.
FUNC Wide share(Wide total, float part) {
  const Wide numerator = unsigned(part * 2147483648.0f);
  return (total >> 31) * numerator + (((total & 0x7fffffffu) * numerator) >> 31);
}

} // namespace quire
