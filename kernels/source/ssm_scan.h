// Mamba-2's recurrence over segments of rows, row after row, with the states in registers.
// LANES lanes have one row of a state, which knows nothing of its other rows; a simdgroup has
// 32 / LANES of them. Threadgroups: parts of a head's rows of state, heads, segments. The pool is
// an input, so MLX believes it is only read: whoever uses it next takes `new_fence` as an input.

constexpr int ROWS = 32 / LANES;
constexpr int SHARE = HEADS / GROUPS;
typedef quire::Share<T, STATE_DIM, LANES> States;

const int lane = int(thread_index_in_simdgroup) % LANES;
const int part = int(threadgroup_position_in_grid.x) * SIMDGROUPS +
    int(simdgroup_index_in_threadgroup);
const int head = int(threadgroup_position_in_grid.y);
const int num_segments = int(sources_shape[0]);
int segment = int(threadgroup_position_in_grid.z);
if (segment == 0 && head == 0 && part == 0 && thread_index_in_simdgroup == 0) new_fence[0] = 1;
if (part >= HEAD_DIM / ROWS) return;
const int place = part * ROWS + int(thread_index_in_simdgroup) / LANES;

if (segment == num_segments - 1) {
  for (int row = starts[num_segments]; row < int(x_shape[0]); ++row) {
    if (lane == 0) y[(size_t(row) * HEADS + head) * HEAD_DIM + place] = T(0.0f);
  }
}
// All at once: each of them takes as long to come as a state.
const int source = sources[segment];
int first = starts[segment];
int end = starts[segment + 1];
int target = targets[segment];
if (source < 0) return; // whoever has the segment before goes on

float state[States::SIZE];
UNROLL
for (int i = 0; i < int(States::SIZE); ++i) state[i] = 0.0f;
const size_t state_row = size_t(head) * HEAD_DIM + place;
constexpr size_t STATE_ROWS = size_t(HEADS) * HEAD_DIM;
if (source > 0) States::load_floats(pool + (source * STATE_ROWS + state_row) * STATE_DIM, lane, state);
const float rate = -quire::exp2(float(a_log[head]) * quire::LOG2_E) * quire::LOG2_E;
const float around = float(d[head]);

// What the AHEAD next rows need is on its way while one is computed, which takes less time.
quire::Packed<T, 4> next_b[AHEAD][States::FOURS], next_c[AHEAD][States::FOURS];
float next_x[AHEAD], next_dt[AHEAD], b_row[States::SIZE], c_row[States::SIZE];
bool goes_on = true;
while (goes_on) {
  goes_on = segment + 1 < num_segments && sources[segment + 1] < 0;
  for (int base = first - AHEAD; base < end; base += AHEAD) {
    UNROLL
    for (int n = 0; n < AHEAD; ++n) {
      const int row = base + n;
      const bool is_computed = row >= first && row < end;
      float value = 0.0f, step = 0.0f;
      if (is_computed) {
        States::unpacked(next_b[n], b_row);
        States::unpacked(next_c[n], c_row);
        value = next_x[n];
        step = next_dt[n];
      }
      if (row + AHEAD < end) {
        const size_t at = row + AHEAD;
        const size_t group = (at * GROUPS + head / SHARE) * STATE_DIM;
        States::load(b + group, lane, next_b[n]);
        States::load(c + group, lane, next_c[n]);
        next_x[n] = float(x[(at * HEADS + head) * HEAD_DIM + place]);
        next_dt[n] = dt[at * HEADS + head];
      }
      if (is_computed) {
        const float decay = quire::exp2(rate * step);
        const float taken = value * step;
        UNROLL
        for (int i = 0; i < int(States::SIZE); ++i) state[i] = state[i] * decay + taken * b_row[i];
        const float given =
            quire::sum_over<LANES>(States::product(state, c_row)) + around * value;
        if (lane == 0) y[(size_t(row) * HEADS + head) * HEAD_DIM + place] = T(given);
      }
    }
  }
  if (target > 0) {
    DEVICE float* states = (DEVICE float*)pool;
    States::store_floats(states + (target * STATE_ROWS + state_row) * STATE_DIM, lane, state);
  }
  ++segment;
  if (goes_on) {
    first = end;
    end = starts[segment + 1];
    target = targets[segment];
  }
}
