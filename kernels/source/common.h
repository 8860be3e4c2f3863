// Helpers in the common subset of Metal and CUDA: appended to either prelude.

namespace quire {

// Finite, so that a row that sees nothing gives zeros instead of NaN.
constexpr float HIDDEN = -1e30f;
constexpr float LOG2_E = 1.4426950408889634f;

// 16 bytes: the widest load of one thread on either device.
struct alignas(16) Pack {
  unsigned int words[4];
};

// The values of type T in a pack.
template <typename T>
FUNC void unpack(Pack pack, THREAD float* out) {
  UNROLL
  for (int i = 0; i < 4; ++i) Word<T>::unpack(pack.words[i], out + i * (4 / int(sizeof(T))));
}

template <typename T>
FUNC Pack pack(THREAD const float* in) {
  Pack result;
  UNROLL
  for (int i = 0; i < 4; ++i) result.words[i] = Word<T>::pack(in + i * (4 / int(sizeof(T))));
  return result;
}

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The smallest power of two of at least n, but no more than a simdgroup.
constexpr int lanes_for(int n) {
  int lanes = 1;
  while (lanes < n && lanes < 32) lanes *= 2;
  return lanes;
}

FUNC float max(float a, float b) { return a > b ? a : b; }
FUNC int min(int a, int b) { return a < b ? a : b; }

FUNC float simd_sum(float x) {
  UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

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

// Loads a tile of keys (or values) of one head from pages (blocks, heads, BLOCK_SIZE, PACKS), U per
// group of LANES lanes. Tiles are aligned, so that a tile lies within a block or consists of whole
// ones: `blocks` are their ids, `offset` is where the tile begins in the first.
template <int U, int N, int LANES, int PACKS, int BLOCK_SIZE>
FUNC void load_tile(
    const DEVICE Pack* pages, THREAD const int* blocks, int offset, int head, int heads, int lane,
    THREAD Pack* loaded) {
  constexpr int KEYS = 32 / LANES;
  constexpr bool WITHIN = U * KEYS <= BLOCK_SIZE;
  UNROLL
  for (int u = 0; u < U; ++u) {
    const int block = blocks[WITHIN ? 0 : u * KEYS / BLOCK_SIZE];
    const int place = (WITHIN ? offset + u * KEYS : u * KEYS % BLOCK_SIZE) + lane / LANES;
    const size_t slot = (size_t(block) * heads + head) * BLOCK_SIZE + place;
    UNROLL
    for (int n = 0; n < N; ++n) {
      const int pack = lane % LANES + n * LANES;
      loaded[u * N + n] = pages[slot * PACKS + (pack < PACKS ? pack : 0)];
    }
  }
}

// N consecutive values, loaded at once.
template <typename T, int N>
struct alignas(N * sizeof(T)) Packed {
  T values[N];
};

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

// How sampling weighs tokens: kernels/sampling.py does the same. A token of 2**-y times the likeliest
// one's probability has the key y * 2**24, and from y = 64 on the key NEVER.
constexpr unsigned NEVER = 1u << 30;

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
