// Attention of 16 rows by matrix units, in Metal's words (8 x 8, float).
// cuda_attention_fragments.h says the same in CUDA's, and how sums lie.

namespace quire {

// Lanes of one row differ in these bits.
CONSTANT int ROW_MASKS[2] = {1, 8};

// Copies a pack into threadgroup memory, or zeros if it is not real.
FUNC void copy_pack(SHARED Pack* to, const DEVICE Pack* from, bool is_real) {
  Pack pack;
  UNROLL
  for (int i = 0; i < 4; ++i) pack.words[i] = 0;
  if (is_real) pack = *from;
  *to = pack;
}
FUNC void wait_for_copies() {}

template <typename T>
struct AttentionFragments {
  // 32 dimensions of the rows r and r + 8.
  struct Queries {
    float values[2][4][2];
  };
  static FUNC Queries queries(const DEVICE T* upper, const DEVICE T* lower, int first, int dims, int lane) {
    Queries result;
    UNROLL
    for (int i = 0; i < 4; ++i) {
      const int at = first + i * 8 + fragment_place(lane) * 2;
      UNROLL
      for (int e = 0; e < 2; ++e) {
        result.values[0][i][e] = at < dims ? float(upper[at + e]) : 0.0f;
        result.values[1][i][e] = at < dims ? float(lower[at + e]) : 0.0f;
      }
    }
    return result;
  }

  // Adds the products with 32 dimensions of 8 keys, `stride` packs apart.
  static FUNC void score(
      THREAD float* sums, const THREAD Queries& q, const SHARED Pack* keys, int stride, int lane) {
    const SHARED Pack* pair = keys + fragment_place(lane) * 2 * stride;
    const SHARED T* first = (const SHARED T*)pair + fragment_row(lane);
    const SHARED T* second = (const SHARED T*)(pair + stride) + fragment_row(lane);
    UNROLL
    for (int i = 0; i < 4; ++i) {
      const float b0 = float(first[i * 8]), b1 = float(second[i * 8]);
      multiply_8x8(sums, q.values[0][i][0], q.values[0][i][1], b0, b1);
      multiply_8x8(sums + 2, q.values[1][i][0], q.values[1][i][1], b0, b1);
    }
  }

  // What 16 rows weigh 16 keys by.
  struct Weights {
    float values[2][4];
  };
  static FUNC Weights weights(THREAD const float* first, THREAD const float* second) {
    Weights result;
    UNROLL
    for (int e = 0; e < 4; ++e) {
      result.values[0][e] = first[e];
      result.values[1][e] = second[e];
    }
    return result;
  }

  // Adds 16 dimensions of 16 weighed values, `stride` packs apart: the first 8 into the first four
  // sums, the others into the rest.
  static FUNC void weigh(
      THREAD float* sums, const THREAD Weights& w, const SHARED Pack* values, int stride, int lane) {
    UNROLL
    for (int k = 0; k < 2; ++k) {
      const SHARED T* row =
          (const SHARED T*)(values + (k * 8 + fragment_row(lane)) * stride) + fragment_place(lane) * 2;
      THREAD const float* a = w.values[k];
      UNROLL
      for (int i = 0; i < 2; ++i) {
        const float b0 = float(row[i * 8]), b1 = float(row[i * 8 + 1]);
        multiply_8x8(sums + i * 4, a[0], a[1], b0, b1);
        multiply_8x8(sums + i * 4 + 2, a[2], a[3], b0, b1);
      }
    }
  }
};

} // namespace quire
