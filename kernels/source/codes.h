// The fragments of quantised weights by their mode; stands after fp4_fragments.

namespace quire {

template <typename T, int BITS, bool FP4>
struct CodesOf {
  typedef Fragments<T, BITS> Codes;
};

template <typename T>
struct CodesOf<T, 4, true> {
  typedef Fp4Fragments<T> Codes;
};

} // namespace quire
