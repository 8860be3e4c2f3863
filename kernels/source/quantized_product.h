// Sums of products of rows of x and quantised weights, by matrix units; stands after
// quantized_fragments.
//
// A simdgroup takes TILES * 16 rows of w, which are columns of the result, and INPUT_TILES * 8 rows of
// x. The SIMDGROUPS of a threadgroup share K, and DEPTH quantisation groups of weights are under way
// before any arithmetic. With w = scale * q + bias, the products of a group are sums of the codes q and
// of x alone, which are exact in 16 bits; scale and bias are applied once a group, in float32.

namespace quire {

// `Codes` are the fragments of a mode: Fragments of MLX's affine one, Fp4Fragments of mxfp4.
template <typename T, typename Codes, int GROUP, int TILES, int INPUT_TILES, int SIMDGROUPS, int DEPTH>
struct QuantizedProduct {
  typedef Codes Words;
  typedef typename Words::Scale Scale;
  enum {
    VALUES = Words::VALUES, // of a word
    WORDS = GROUP / VALUES / 4, // of a quantisation group, in one lane
    LANE_ROWS = Words::LANE_ROWS,
    ROWS = INPUT_TILES * 8,
    LANE_ALL = INPUT_TILES * LANE_ROWS, // of them, that a lane takes
    SUMS = TILES * INPUT_TILES * 4
  };

  // Which of the eight rows of an input tile a lane takes.
  static FUNC int lane_row(int lane, int i) { return Words::lane_row(lane, i); }

  // Adds to `sums`. `rows` are those of x whose values the lane takes, LANE_ROWS of each input tile;
  // columns beyond the last of w's `columns` rows are that one again.
  static FUNC void add(
      THREAD float* sums, const DEVICE T* x, const THREAD int* rows, const DEVICE unsigned int* w,
      const DEVICE Scale* scales, const DEVICE T* biases, int first_column, int columns, int depth, int simdgroup,
      int lane) {
    const int groups = depth / GROUP;
    const int row = fragment_row(lane);
    const int place = fragment_place(lane);
    for (int base = simdgroup * DEPTH; base < groups; base += SIMDGROUPS * DEPTH) {
      Packed<unsigned int, WORDS> packed[DEPTH][TILES * 2];
      Scale scale[DEPTH][TILES * 2];
      T bias[DEPTH][TILES * 2];
      UNROLL
      for (int d = 0; d < DEPTH; ++d) {
        const int group = min(base + d, groups - 1);
        UNROLL
        for (int i = 0; i < TILES * 2; ++i) {
          const int column = min(first_column + i * 8 + row, columns - 1);
          const size_t at = size_t(column) * groups + group;
          packed[d][i] = ((const DEVICE Packed<unsigned int, WORDS>*)w)[at * 4 + place];
          scale[d][i] = scales[at];
          if (Words::HAS_BIAS) bias[d][i] = biases[at];
        }
      }
      UNROLL
      for (int d = 0; d < DEPTH; ++d) {
        if (base + d < groups) {
          float products[TILES * INPUT_TILES * 4], totals[INPUT_TILES * 4];
          UNROLL
          for (int i = 0; i < TILES * INPUT_TILES * 4; ++i) products[i] = 0.0f;
          UNROLL
          for (int i = 0; i < INPUT_TILES * 4; ++i) totals[i] = 0.0f;
          UNROLL
          for (int j = 0; j < WORDS; ++j) {
            typename Words::Inputs inputs[INPUT_TILES];
            UNROLL
            for (int m = 0; m < INPUT_TILES; ++m) {
              inputs[m] = Words::inputs(
                  x, rows + m * LANE_ROWS, depth, (base + d) * GROUP + j * VALUES, WORDS * VALUES, lane);
              if (Words::HAS_BIAS) Words::add(totals + m * 4, inputs[m]);
            }
            UNROLL
            for (int i = 0; i < TILES; ++i) {
              const typename Words::Weights weights =
                  Words::weights(packed[d][i * 2].values[j], packed[d][i * 2 + 1].values[j]);
              UNROLL
              for (int m = 0; m < INPUT_TILES; ++m) {
                Words::multiply(products + (i * INPUT_TILES + m) * 4, weights, inputs[m]);
              }
            }
          }
          UNROLL
          for (int i = 0; i < TILES; ++i) {
            UNROLL
            for (int e = 0; e < INPUT_TILES * 4; ++e) {
              const float s = Words::scale(scale[d][i * 2 + e % 4 / 2]);
              sums[i * INPUT_TILES * 4 + e] += products[i * INPUT_TILES * 4 + e] * s;
              if (Words::HAS_BIAS) {
                const float b = float(bias[d][i * 2 + e % 4 / 2]) - Words::OFFSET * s;
                sums[i * INPUT_TILES * 4 + e] += totals[e] * b;
              }
            }
          }
        }
      }
    }
  }
};

// A matrix of (columns, depth), as the products of experts take it.
template <typename T, typename Product>
struct QuantizedExpert {
  const DEVICE unsigned int* w;
  const DEVICE typename Product::Scale* scales;
  const DEVICE T* biases;
  int depth;

  FUNC void add(
      THREAD float* sums, const DEVICE T* x, const THREAD int* rows, int first_column, int columns, int simdgroup,
      int lane) const {
    Product::add(sums, x, rows, w, scales, biases, first_column, columns, depth, simdgroup, lane);
  }
};

} // namespace quire
