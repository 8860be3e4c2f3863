// Loads from KV pages.

namespace quire {

// The smallest power of two of at least n, but no more than a simdgroup.
constexpr int lanes_for(int n) {
  int lanes = 1;
  while (lanes < n && lanes < 32) lanes *= 2;
  return lanes;
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

} // namespace quire
