// The last of three kernels that draw one token of each row, in the order of the vocabulary: first
// the stretch, by what each keeps, then the token. A threadgroup takes one row.

constexpr int SIMDGROUPS = THREADS / 32; // a power of two
constexpr int PACKS = VOCAB / WIDTH;

SHARED quire::Wide sums[SIMDGROUPS];
SHARED unsigned drawn[1];

const int row = int(threadgroup_position_in_grid.x);
const int index = int(thread_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);
const float scale = parameters[row * 8]; // log2(e) / temperature, 0 to take the likeliest
const float chance = parameters[row * 8 + 4];
const int stretches = int(parameters[row * 8 + 5]);
const int span = quire::ceil_div(PACKS, stretches) * WIDTH;
const int each = quire::ceil_div(span, THREADS);
const unsigned limit = state[row * 8 + 1];

const bool real = lane < stretches;
const int own = row * stretches + (real ? lane : 0);
quire::Best best = {real ? peaks[own] : quire::LOWEST, places[own]};
best = quire::best_of_lanes(best, lane);
const quire::Wide mass = real ? (quire::Wide(kept[own * 2]) << 32) | kept[own * 2 + 1] : 0;
const quire::Wide up_to = quire::inclusive_sum(mass, lane);
quire::Wide target = quire::share(quire::shuffle(up_to, 31), chance);
// The first stretch that reaches beyond the target: as many come before as do not.
int stretch = int(quire::simd_sum(up_to <= target ? 1.0f : 0.0f));
stretch = quire::min(stretch, stretches - 1);
target -= quire::shuffle(up_to - mass, stretch);
if (index == 0) drawn[0] = best.place; // stays where the logits are not numbers

if (scale != 0.0f) {
  const int first = stretch * span + index * each;
  const int last = quire::min(first + each, quire::min((stretch + 1) * span, VOCAB));
  const size_t start = size_t(row) * VOCAB;
  quire::Wide mine = 0;
  for (int token = first; token < last; ++token) {
    const unsigned key = quire::sampling_key((best.peak - float(logits[start + token])) * scale);
    if (key <= limit) mine += quire::weight_of_key(key);
  }
  quire::Wide before = quire::inclusive_sum(mine, lane);
  if (lane == 31) sums[simdgroup] = before;
  BARRIER();
  const quire::Wide sums_up_to = quire::inclusive_sum(lane < SIMDGROUPS ? sums[lane] : 0, lane);
  before += quire::shuffle(sums_up_to, simdgroup) - sums[simdgroup] - mine;
  if (before <= target && target - before < mine) {
    int token = first;
    for (; token < last - 1; ++token) {
      const unsigned key = quire::sampling_key((best.peak - float(logits[start + token])) * scale);
      if (key <= limit) before += quire::weight_of_key(key);
      if (before > target) break;
    }
    drawn[0] = unsigned(token);
  }
}
BARRIER();
if (index == 0) tokens[row] = int(drawn[0]);
