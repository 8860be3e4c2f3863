// The gated delta rule over segments of rows, row after row, with the states in registers.
// LANES lanes have one row of a state, which knows nothing of its other rows; a simdgroup has
// 32 / LANES of them. Threadgroups: parts of a head's value rows, heads, segments. The pool is an
// input, so MLX believes it is only read: whoever uses it next takes `new_fence` as an input.

constexpr int ROWS = 32 / LANES;
constexpr int SHARE = VALUE_HEADS / KEY_HEADS;
constexpr int STEP = VECTOR ? KEY_DIM : 1;
typedef quire::Share<T, KEY_DIM, LANES> Keys;
constexpr int GATES = VECTOR ? int(Keys::SIZE) : 1;

const int lane = int(thread_index_in_simdgroup) % LANES;
const int part = int(threadgroup_position_in_grid.x) * SIMDGROUPS +
    int(simdgroup_index_in_threadgroup);
const int head = int(threadgroup_position_in_grid.y);
const int num_segments = int(sources_shape[0]);
int segment = int(threadgroup_position_in_grid.z);
if (segment == 0 && head == 0 && part == 0 && thread_index_in_simdgroup == 0) new_fence[0] = 1;
if (part >= VALUE_DIM / ROWS) return;
const int place = part * ROWS + int(thread_index_in_simdgroup) / LANES;

if (segment == num_segments - 1) {
  for (int row = starts[num_segments]; row < int(q_shape[0]); ++row) {
    if (lane == 0) y[(size_t(row) * VALUE_HEADS + head) * VALUE_DIM + place] = T(0.0f);
  }
}
// All at once: each of them takes as long to come as a state.
const int source = sources[segment];
int first = starts[segment];
int end = starts[segment + 1];
int target = targets[segment];
if (source < 0) return; // whoever has the segment before goes on

float state[Keys::SIZE];
UNROLL
for (int i = 0; i < int(Keys::SIZE); ++i) state[i] = 0.0f;
const size_t state_row = size_t(head) * VALUE_DIM + place;
constexpr size_t STATE_ROWS = size_t(VALUE_HEADS) * VALUE_DIM;
if (source > 0) Keys::load_floats(pool + (source * STATE_ROWS + state_row) * KEY_DIM, lane, state);

// What the AHEAD next rows need is on its way while one is computed, which takes less time.
quire::Packed<T, 4> next_q[AHEAD][Keys::FOURS], next_k[AHEAD][Keys::FOURS];
float next_g[AHEAD][GATES], next_v[AHEAD], next_beta[AHEAD];
float q_row[Keys::SIZE], k_row[Keys::SIZE], g_row[GATES];
bool goes_on = true;
while (goes_on) {
  goes_on = segment + 1 < num_segments && sources[segment + 1] < 0;
  for (int base = first - AHEAD; base < end; base += AHEAD) {
    UNROLL
    for (int n = 0; n < AHEAD; ++n) {
      const int row = base + n;
      const bool is_computed = row >= first && row < end;
      float value = 0.0f, beta_row = 0.0f;
      if (is_computed) {
        Keys::unpacked(next_q[n], q_row);
        Keys::unpacked(next_k[n], k_row);
        UNROLL
        for (int i = 0; i < GATES; ++i) g_row[i] = next_g[n][i];
        value = next_v[n];
        beta_row = next_beta[n];
      }
      if (row + AHEAD < end) {
        const size_t at = row + AHEAD;
        const size_t key = (at * KEY_HEADS + head / SHARE) * KEY_DIM;
        const size_t at_head = at * VALUE_HEADS + head;
        Keys::load(q + key, lane, next_q[n]);
        Keys::load(k + key, lane, next_k[n]);
        next_v[n] = float(v[at_head * VALUE_DIM + place]);
        next_beta[n] = float(beta[at_head]);
        UNROLL
        for (int i = 0; i < GATES; ++i) {
          next_g[n][i] = g[at_head * STEP + (VECTOR ? Keys::place(i / 4, lane) * 4 + i % 4 : 0)];
        }
      }
      if (is_computed) {
        UNROLL
        for (int i = 0; i < int(Keys::SIZE); ++i) state[i] *= g_row[VECTOR ? i : 0];
        const float held = quire::sum_over<LANES>(Keys::product(state, k_row));
        const float delta = (value - held) * beta_row;
        UNROLL
        for (int i = 0; i < int(Keys::SIZE); ++i) state[i] += k_row[i] * delta;
        const float read = quire::sum_over<LANES>(Keys::product(state, q_row));
        if (lane == 0) y[(size_t(row) * VALUE_HEADS + head) * VALUE_DIM + place] = T(read);
      }
    }
  }
  if (target > 0) {
    DEVICE float* states = (DEVICE float*)pool;
    Keys::store_floats(states + (target * STATE_ROWS + state_row) * KEY_DIM, lane, state);
  }
  ++segment;
  if (goes_on) {
    first = end;
    end = starts[segment + 1];
    target = targets[segment];
  }
}
