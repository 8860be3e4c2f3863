// The second of three kernels that draw one token of each row, launched several times.
//
// The limits of top-k and top-p are found ten bits of the key at a time: a histogram of the tokens
// whose key begins as the limit does shows how the limit goes on. A launch adds up the histograms
// that the stretches of its row made in the launch before, and makes the next ones. When a row has
// its limits, each stretch adds up what it keeps, once.
// Every sum is one of integers, so the order of the additions does not matter.
//
// state: phase, limit, prefix, high and low half of the goal. The phase is what has been done: 0
// nothing, 1 to 3 counting by rank, 4 to 6 by mass, 7 all.

constexpr int BITS = 10;
constexpr int BUCKETS = 1 << BITS;
constexpr int SIMDGROUPS = THREADS / 32; // a power of two
constexpr int OWNED = BUCKETS / THREADS; // buckets of one thread
constexpr int PACKS = VOCAB / WIDTH;
constexpr int LOADS = WIDTH < 8 ? 4 : 2; // under way at once
constexpr unsigned BY_RANK = 1, BY_MASS = 4, DONE = 7;

SHARED quire::SharedCounter low[BUCKETS];
SHARED quire::SharedCounter high[BUCKETS];
SHARED quire::Wide sums[SIMDGROUPS];
SHARED unsigned found_bucket[1];
SHARED quire::Wide found_rest[1];

const int stretch = int(threadgroup_position_in_grid.x);
const int row = int(threadgroup_position_in_grid.y);
const int index = int(thread_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);
const float scale = parameters[row * 8]; // log2(e) / temperature, 0 to take the likeliest
const int top_k = int(parameters[row * 8 + 1]);
const float top_p = parameters[row * 8 + 2];
const float range = parameters[row * 8 + 3]; // -log2(min_p)
const int stretches = int(parameters[row * 8 + 5]);
const int span = quire::ceil_div(PACKS, stretches);
const int begin = stretch * span;
const int end = quire::min(begin + span, PACKS);
const DEVICE quire::Packed<T, WIDTH>* packs =
    (const DEVICE quire::Packed<T, WIDTH>*)logits + size_t(row) * PACKS;
const float peak = quire::highest_of_lanes(
    lane < stretches ? peaks[row * stretches + lane] : quire::LOWEST);

const unsigned phase = state[row * 8];
unsigned limit = phase == 0 ? quire::NEVER - 1 : state[row * 8 + 1]; // tokens stay up to this key
unsigned prefix = state[row * 8 + 2];
// Looked for: the first key at which the count, or the mass, of the tokens so far exceeds this.
quire::Wide goal = (quire::Wide(state[row * 8 + 3]) << 32) | state[row * 8 + 4];
const bool ranks = top_k >= 1 && top_k < VOCAB;
const bool masses = top_p < 1.0f;
unsigned next = DONE;

if (phase == 0 && scale != 0.0f) {
  next = ranks ? BY_RANK : masses ? BY_MASS : DONE;
  goal = ranks ? top_k - 1 : 0;
} else if (phase > 0 && phase < DONE) {
  const bool by_rank = phase < BY_MASS;
  const unsigned level = (phase - 1) % 3;
  const int shift = (2 - int(level)) * BITS;
  if (index == 0) {
    // All that is left stays where the tokens never reach the goal.
    found_bucket[0] = BUCKETS - 1;
    found_rest[0] = goal;
  }
  quire::Wide values[OWNED], mine = 0;
  UNROLL
  for (int o = 0; o < OWNED; ++o) {
    const unsigned bucket = unsigned(index * OWNED + o);
    quire::Wide lows = 0, highs = 0;
    for (int s = 0; s < stretches; ++s) {
      const size_t at = (size_t(row * stretches + s) * BUCKETS + bucket) * 2;
      lows += counts[at];
      highs += counts[at + 1];
    }
    values[o] = lows;
    if (!by_rank) {
      values[o] += highs * 4096;
      values[o] = (values[o] << 16) >> ((((prefix << BITS) | bucket) << shift) >> 24);
    }
    mine += values[o];
  }
  quire::Wide before = quire::inclusive_sum(mine, lane);
  if (lane == 31) sums[simdgroup] = before;
  BARRIER();
  const quire::Wide up_to = quire::inclusive_sum(lane < SIMDGROUPS ? sums[lane] : 0, lane);
  before += quire::shuffle(up_to, simdgroup) - sums[simdgroup] - mine;
  if (phase == BY_MASS) {
    goal = quire::share(quire::shuffle(up_to, 31), top_p);
    if (goal > 0) --goal;
    if (index == 0) found_rest[0] = goal;
  }
  BARRIER();
  if (before <= goal && goal - before < mine) {
    int o = 0;
    for (; o < OWNED - 1 && goal - before >= values[o]; ++o) before += values[o];
    found_bucket[0] = unsigned(index * OWNED + o);
    found_rest[0] = goal - before;
  }
  BARRIER();
  prefix = (prefix << BITS) | found_bucket[0];
  goal = found_rest[0];
  next = phase + 1;
  if (level == 2) {
    limit = prefix < limit ? prefix : limit;
    prefix = 0;
    goal = 0;
    next = by_rank && masses ? BY_MASS : DONE;
  }
}

const size_t own = size_t(row * stretches + stretch);
if (next < DONE) {
  const bool by_rank = next < BY_MASS;
  const int shift = (2 - int((next - 1) % 3)) * BITS;
  for (int b = index; b < BUCKETS; b += THREADS) {
    quire::set(low[b], 0);
    quire::set(high[b], 0);
  }
  BARRIER();
  for (int base = begin + index; base < end; base += THREADS * LOADS) {
    quire::Packed<T, WIDTH> loaded[LOADS];
    UNROLL
    for (int u = 0; u < LOADS; ++u) loaded[u] = packs[quire::min(base + THREADS * u, end - 1)];
    UNROLL
    for (int u = 0; u < LOADS; ++u) {
      UNROLL
      for (int e = 0; e < WIDTH; ++e) {
        const unsigned key = quire::sampling_key((peak - float(loaded[u].values[e])) * scale);
        if (base + THREADS * u < end && key <= limit && (key >> (shift + BITS)) == prefix) {
          const unsigned bucket = (key >> shift) % BUCKETS;
          if (by_rank) {
            quire::add(low[bucket], 1);
          } else {
            // Halves of 12 bits, so that a million of them fit in 32.
            const unsigned mantissa = quire::mantissa_of_key(key);
            quire::add(low[bucket], mantissa % 4096);
            quire::add(high[bucket], mantissa / 4096);
          }
        }
      }
    }
  }
  BARRIER();
  for (int b = index; b < BUCKETS; b += THREADS) {
    next_counts[(own * BUCKETS + b) * 2] = quire::get(low[b]);
    next_counts[(own * BUCKETS + b) * 2 + 1] = quire::get(high[b]);
  }
} else if (phase < DONE) {
  const unsigned range_key = quire::sampling_key(range);
  limit = range_key < limit ? range_key : limit;
  quire::Wide mine = 0;
  for (int base = begin + index; base < end; base += THREADS * LOADS) {
    quire::Packed<T, WIDTH> loaded[LOADS];
    UNROLL
    for (int u = 0; u < LOADS; ++u) loaded[u] = packs[quire::min(base + THREADS * u, end - 1)];
    UNROLL
    for (int u = 0; u < LOADS; ++u) {
      UNROLL
      for (int e = 0; e < WIDTH; ++e) {
        const unsigned key = quire::sampling_key((peak - float(loaded[u].values[e])) * scale);
        if (base + THREADS * u < end && key <= limit) mine += quire::weight_of_key(key);
      }
    }
  }
  mine = quire::inclusive_sum(mine, lane);
  if (lane == 31) sums[simdgroup] = mine;
  BARRIER();
  mine = quire::inclusive_sum(lane < SIMDGROUPS ? sums[lane] : 0, lane);
  if (index == 31) {
    next_kept[own * 2] = unsigned(mine >> 32);
    next_kept[own * 2 + 1] = unsigned(mine);
  }
} else if (index < 2) {
  next_kept[own * 2 + index] = kept[own * 2 + index];
}
if (stretch == 0 && index == 0) {
  next_state[row * 8] = next;
  next_state[row * 8 + 1] = limit;
  next_state[row * 8 + 2] = prefix;
  next_state[row * 8 + 3] = unsigned(goal >> 32);
  next_state[row * 8 + 4] = unsigned(goal);
}
