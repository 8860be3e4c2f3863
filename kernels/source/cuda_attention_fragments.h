// Attention of 16 rows by matrix units, in CUDA's words (mma.sync). metal_attention_fragments.h says
// the same in Metal's.
//
// Sums of a tile of 16 rows and 8 columns lie in a simdgroup so: a lane has columns 2 * place and
// 2 * place + 1 of row `fragment_row` (first two) and of the row 8 below (last two).

namespace quire {

// Lanes of one row differ in these bits.
CONSTANT int ROW_MASKS[2] = {1, 2};

// Begins to copy a pack into threadgroup memory, or zeros if it is not real.
FUNC void copy_pack(Pack* to, const Pack* from, bool is_real) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
      :: "r"(at), "l"(from), "r"(is_real ? 16 : 0) : "memory");
}
FUNC void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

template <typename T>
struct AttentionFragments {
  // 32 dimensions of the rows r and r + 8. Their order is free: a lane takes 16 bytes of each.
  struct Queries {
    Pack rows[2];
  };
  static FUNC Queries queries(const T* upper, const T* lower, int first, int dims, int lane) {
    const int at = first + fragment_place(lane) * 8;
    Queries result = {};
    if (at < dims) {
      result.rows[0] = *reinterpret_cast<const Pack*>(upper + at);
      result.rows[1] = *reinterpret_cast<const Pack*>(lower + at);
    }
    return result;
  }

  // Adds the products with 32 dimensions of 8 keys, `stride` packs apart.
  static FUNC void score(float* sums, const Queries& q, const Pack* keys, int stride, int lane) {
    const Pack key = keys[fragment_row(lane) * stride + fragment_place(lane)];
    UNROLL
    for (int i = 0; i < 4; i += 2) {
      Pairs<T>::multiply(
          sums, q.rows[0].words[i], q.rows[1].words[i], q.rows[0].words[i + 1], q.rows[1].words[i + 1],
          key.words[i], key.words[i + 1]);
    }
  }

  // What 16 rows weigh 16 keys by.
  struct Weights {
    unsigned words[4];
  };
  static FUNC Weights weights(const float* first, const float* second) {
    return {{Word<T>::pack(first), Word<T>::pack(first + 2), Word<T>::pack(second), Word<T>::pack(second + 2)}};
  }

  // Adds 16 dimensions of 16 weighed values, `stride` packs apart: the first 8 into the first four
  // sums, the others into the rest.
  static FUNC void weigh(float* sums, const Weights& w, const Pack* values, int stride, int lane) {
    const Pack* row = values + lane % 16 * stride + lane / 16;
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    unsigned v[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
    Pairs<T>::multiply(sums, w.words[0], w.words[1], w.words[2], w.words[3], v[0], v[1]);
    Pairs<T>::multiply(sums + 4, w.words[0], w.words[1], w.words[2], w.words[3], v[2], v[3]);
  }
};

} // namespace quire
