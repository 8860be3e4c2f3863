// Helpers in the common subset of Metal and CUDA: appended to either prelude.

namespace quire {

// Finite, so that a row that sees nothing gives zeros instead of NaN.
CONSTANT float HIDDEN = -1e30f;
CONSTANT float LOG2_E = 1.4426950408889634f;

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

FUNC float max(float a, float b) { return a > b ? a : b; }
FUNC int min(int a, int b) { return a < b ? a : b; }
FUNC int max(int a, int b) { return a > b ? a : b; }

FUNC float simd_sum(float x) {
  UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// N consecutive values, loaded at once.
template <typename T, int N>
struct alignas(N * sizeof(T)) Packed {
  T values[N];
};

} // namespace quire
