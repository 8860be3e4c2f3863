// Draws one token of each row: kernels/sampling.py tells what is drawn, and how tokens are weighed.
//
// One threadgroup takes one row. Each simdgroup reads a stretch of it, and every sum is one of
// integers, so the order of the additions does not matter.
// The limits of top-k and top-p are found ten bits of the key at a time: a histogram of the tokens
// whose key begins as the limit does shows how the limit goes on.

constexpr int BITS = 10;
constexpr int BUCKETS = 1 << BITS;
constexpr int SIMDGROUPS = THREADS / 32; // a power of two
constexpr int OWNED = BUCKETS / THREADS; // buckets of one thread
constexpr int PACKS = VOCAB / WIDTH;
constexpr int SPAN = quire::ceil_div(PACKS, SIMDGROUPS); // packs of one simdgroup
constexpr int EACH = quire::ceil_div(SPAN * WIDTH, THREADS); // tokens of one thread, once it is that stretch
constexpr int LOADS = WIDTH < 8 ? 4 : 2; // under way at once; a thread has at most 64 registers

SHARED quire::SharedCounter low[BUCKETS];
SHARED quire::SharedCounter high[BUCKETS];
SHARED quire::Wide sums[SIMDGROUPS];
SHARED float peaks[SIMDGROUPS];
SHARED unsigned places[SIMDGROUPS];
SHARED unsigned found_bucket[1];
SHARED quire::Wide found_rest[1];
SHARED unsigned drawn[1];

const int row = int(threadgroup_position_in_grid.x);
const int index = int(thread_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);
const int begin = simdgroup * SPAN;
const int end = quire::min(begin + SPAN, PACKS);
const DEVICE quire::Packed<T, WIDTH>* packs =
    (const DEVICE quire::Packed<T, WIDTH>*)logits + size_t(row) * PACKS;

const float scale = parameters[row * 5]; // log2(e) / temperature, 0 to take the likeliest
const int top_k = int(parameters[row * 5 + 1]);
const float top_p = parameters[row * 5 + 2];
const float range = parameters[row * 5 + 3]; // -log2(min_p)
const float chance = parameters[row * 5 + 4];

// The likeliest token, the first of equals.
float peak = -3.4e38f;
unsigned place = 0;
for (int base = begin + lane; base < end; base += 32 * LOADS) {
  quire::Packed<T, WIDTH> loaded[LOADS];
  UNROLL
  for (int u = 0; u < LOADS; ++u) loaded[u] = packs[quire::min(base + 32 * u, end - 1)];
  UNROLL
  for (int u = 0; u < LOADS; ++u) {
    if (base + 32 * u < end) {
      UNROLL
      for (int e = 0; e < WIDTH; ++e) {
        const float logit = float(loaded[u].values[e]);
        if (logit > peak) {
          peak = logit;
          place = unsigned((base + 32 * u) * WIDTH + e);
        }
      }
    }
  }
}
UNROLL
for (int mask = 16; mask > 0; mask /= 2) {
  const float other = quire::shuffle_xor(peak, mask);
  const unsigned other_place = quire::shuffle(place, lane ^ mask);
  if (other > peak || (other == peak && other_place < place)) {
    peak = other;
    place = other_place;
  }
}
if (index == 0) {
  found_bucket[0] = 0;
  found_rest[0] = 0;
}
if (lane == 0) {
  peaks[simdgroup] = peak;
  places[simdgroup] = place;
}
BARRIER();
peak = peaks[lane % SIMDGROUPS];
place = places[lane % SIMDGROUPS];
UNROLL
for (int mask = 16; mask > 0; mask /= 2) {
  const float other = quire::shuffle_xor(peak, mask);
  const unsigned other_place = quire::shuffle(place, lane ^ mask);
  if (other > peak || (other == peak && other_place < place)) {
    peak = other;
    place = other_place;
  }
}
if (scale == 0.0f) {
  if (index == 0) tokens[row] = int(place);
  return;
}

// Tokens stay up to this key.
unsigned limit = quire::NEVER - 1;
for (int search = 0; search < 2; ++search) {
  const bool by_rank = search == 0;
  if (by_rank ? top_k < 1 || top_k >= VOCAB : top_p >= 1.0f) continue;
  // Looked for: the first key at which the count, or the mass, of the tokens so far exceeds this.
  quire::Wide goal = by_rank ? top_k - 1 : 0;
  unsigned prefix = 0;
  for (int shift = 2 * BITS; shift >= 0; shift -= BITS) {
    for (int b = index; b < BUCKETS; b += THREADS) {
      quire::set(low[b], 0);
      quire::set(high[b], 0);
    }
    BARRIER();
    for (int base = begin + lane; base < end; base += 32 * LOADS) {
      quire::Packed<T, WIDTH> loaded[LOADS];
      UNROLL
      for (int u = 0; u < LOADS; ++u) loaded[u] = packs[quire::min(base + 32 * u, end - 1)];
      UNROLL
      for (int u = 0; u < LOADS; ++u) {
        UNROLL
        for (int e = 0; e < WIDTH; ++e) {
          const unsigned key = quire::sampling_key((peak - float(loaded[u].values[e])) * scale);
          if (base + 32 * u < end && key <= limit && (key >> (shift + BITS)) == prefix) {
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
    quire::Wide values[OWNED], mine = 0;
    UNROLL
    for (int o = 0; o < OWNED; ++o) {
      const unsigned bucket = index * OWNED + o;
      values[o] = quire::get(low[bucket]);
      if (!by_rank) {
        values[o] += quire::Wide(quire::get(high[bucket])) * 4096;
        values[o] = (values[o] << 16) >> ((((prefix << BITS) | bucket) << shift) >> 24);
      }
      mine += values[o];
    }
    quire::Wide before = quire::inclusive_sum(mine, lane);
    if (lane == 31) sums[simdgroup] = before;
    if (index == 0) {
      // All that is left stays where the tokens never reach the goal.
      found_bucket[0] = BUCKETS - 1;
      found_rest[0] = goal;
    }
    BARRIER();
    const quire::Wide up_to = quire::inclusive_sum(lane < SIMDGROUPS ? sums[lane] : 0, lane);
    before += quire::shuffle(up_to, simdgroup) - sums[simdgroup] - mine;
    const quire::Wide total = quire::shuffle(up_to, 31);
    if (!by_rank && shift == 2 * BITS) {
      goal = quire::share(total, top_p);
      if (goal > 0) --goal;
    }
    if (before <= goal && goal - before < mine) {
      int o = 0;
      for (; o < OWNED - 1 && goal - before >= values[o]; ++o) before += values[o];
      found_bucket[0] = index * OWNED + o;
      found_rest[0] = goal - before;
    }
    BARRIER();
    prefix = (prefix << BITS) | found_bucket[0];
    goal = found_rest[0];
  }
  limit = prefix < limit ? prefix : limit;
}
const unsigned range_key = quire::sampling_key(range);
limit = range_key < limit ? range_key : limit;

// The draw, in the order of the vocabulary: first the stretch, then the token.
quire::Wide mine = 0;
for (int base = begin + lane; base < end; base += 32 * LOADS) {
  quire::Packed<T, WIDTH> loaded[LOADS];
  UNROLL
  for (int u = 0; u < LOADS; ++u) loaded[u] = packs[quire::min(base + 32 * u, end - 1)];
  UNROLL
  for (int u = 0; u < LOADS; ++u) {
    UNROLL
    for (int e = 0; e < WIDTH; ++e) {
      const unsigned key = quire::sampling_key((peak - float(loaded[u].values[e])) * scale);
      if (base + 32 * u < end && key <= limit) mine += quire::weight_of_key(key);
    }
  }
}
quire::Wide up_to = quire::inclusive_sum(mine, lane);
if (lane == 31) sums[simdgroup] = up_to;
BARRIER();
mine = lane < SIMDGROUPS ? sums[lane] : 0;
up_to = quire::inclusive_sum(mine, lane);
quire::Wide target = quire::share(quire::shuffle(up_to, 31), chance);
if (simdgroup == 0 && target < up_to && up_to - mine <= target) {
  found_bucket[0] = lane;
  found_rest[0] = target - (up_to - mine);
}
if (index == 0) drawn[0] = place; // stays where the logits are not numbers
BARRIER();
const int stretch = quire::min(int(found_bucket[0]), SIMDGROUPS - 1);
target = found_rest[0];

const int first = stretch * SPAN * WIDTH + index * EACH;
const int last = quire::min(first + EACH, quire::min((stretch + 1) * SPAN * WIDTH, VOCAB));
const size_t start = size_t(row) * VOCAB;
mine = 0;
for (int token = first; token < last; ++token) {
  const unsigned key = quire::sampling_key((peak - float(logits[start + token])) * scale);
  if (key <= limit) mine += quire::weight_of_key(key);
}
quire::Wide before = quire::inclusive_sum(mine, lane);
if (lane == 31) sums[simdgroup] = before;
BARRIER();
up_to = quire::inclusive_sum(lane < SIMDGROUPS ? sums[lane] : 0, lane);
before += quire::shuffle(up_to, simdgroup) - sums[simdgroup] - mine;
if (before <= target && target - before < mine) {
  int token = first;
  for (; token < last - 1; ++token) {
    const unsigned key = quire::sampling_key((peak - float(logits[start + token])) * scale);
    if (key <= limit) before += quire::weight_of_key(key);
    if (before > target) break;
  }
  drawn[0] = unsigned(token);
}
BARRIER();
if (index == 0) tokens[row] = int(drawn[0]);
