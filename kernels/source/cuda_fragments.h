// Products of small matrices by matrix units, in CUDA's words (mma.sync). metal_fragments.h says the
// same in Metal's.
//
// Fragments are spread over a simdgroup by rows: the four lanes of `fragment_row` are told apart by
// `fragment_place`. A product sums over the four lanes of a row and the values in each, so the order
// of K within a row is free as long as weights and x agree: a lane takes whole words of weights.

namespace quire {

FUNC int fragment_row(int lane) { return lane / 4; }
FUNC int fragment_place(int lane) { return lane % 4; }

// Of two 16-bit values in a word.
template <typename T>
struct Pairs;

template <>
struct Pairs<__half> {
  static FUNC void multiply(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

template <>
struct Pairs<__nv_bfloat16> {
  static FUNC void multiply(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

} // namespace quire
