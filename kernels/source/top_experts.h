// The experts of each row: those of the highest scores, and what their results weigh. A simdgroup
// takes one row, of which each lane holds every 32nd score.

constexpr int HELD = quire::ceil_div(EXPERTS, 32);
const int lane = int(thread_index_in_simdgroup);
const size_t row = size_t(threadgroup_position_in_grid.x);

constexpr float LAST = quire::LOWEST / 2;
// By `order` experts are chosen, by `score` they weigh.
float order[HELD], score[HELD];
float highest = quire::LOWEST;
UNROLL
for (int i = 0; i < HELD; ++i) {
  const int expert = lane + 32 * i;
  // What cannot be chosen, or is no number, comes last of those that there are.
  order[i] = expert < EXPERTS ? quire::max(float(logits[row * EXPERTS + expert]), LAST) : quire::LOWEST;
  highest = quire::max(highest, order[i]);
}
if (SIGMOID) {
  UNROLL
  for (int i = 0; i < HELD; ++i) {
    const int expert = quire::min(lane + 32 * i, EXPERTS - 1);
    score[i] = 1.0f / (1.0f + quire::exp2(-order[i] * quire::LOG2_E));
    if (order[i] > LAST) order[i] = score[i] + (BIASED ? float(bias[expert]) : 0.0f);
  }
} else {
  highest = quire::highest_of_lanes(highest);
  float total = 0.0f;
  UNROLL
  for (int i = 0; i < HELD; ++i) {
    score[i] = quire::exp2((order[i] - highest) * quire::LOG2_E);
    total += score[i];
  }
  total = quire::simd_sum(total);
  UNROLL
  for (int i = 0; i < HELD; ++i) score[i] /= total;
}

// The n-th lane keeps the n-th expert.
float weight = 0.0f;
unsigned own = 0;
for (int n = 0; n < CHOSEN; ++n) {
  quire::Best best = {quire::LOWEST, unsigned(lane)};
  UNROLL
  for (int i = 0; i < HELD; ++i) {
    if (order[i] > best.peak) {
      best.peak = order[i];
      best.place = unsigned(lane + 32 * i);
    }
  }
  best = quire::best_of_lanes(best, lane);
  float its_score = 0.0f;
  UNROLL
  for (int i = 0; i < HELD; ++i) {
    if (unsigned(lane + 32 * i) == best.place) {
      its_score = score[i];
      order[i] = quire::LOWEST;
    }
  }
  its_score = quire::shuffle(its_score, int(best.place % 32));
  if (lane == n) {
    weight = its_score;
    own = best.place;
  }
}
if (NORMALISED) weight /= quire::simd_sum(weight) + quire::as_float(EPSILON);
if (lane < CHOSEN) {
  weight *= FACTORED ? float(factors[own]) : quire::as_float(SCALE);
  experts[row * CHOSEN + lane] = own;
  weights[row * CHOSEN + lane] = W(weight);
}
