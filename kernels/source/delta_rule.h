// The gated delta rule over segments of rows, row after row, with the states in registers.
// LANES lanes have one row of a state, which knows nothing of its other rows; a simdgroup has
// 32 / LANES of them. Threadgroups: parts of a head's value rows, heads, segments. The pool is an
// input, so MLX believes it is only read: whoever uses it next takes `new_fence` as an input.

constexpr int ROWS = 32 / LANES;
constexpr int PLACES = ROWS * SIMDGROUPS; // value rows of a threadgroup
constexpr int THREADS = 32 * SIMDGROUPS;
constexpr int SHARE = VALUE_HEADS / KEY_HEADS;
constexpr int STEP = VECTOR ? KEY_DIM : 1;
constexpr int FOURS = KEY_DIM / 4;
constexpr int TILE = quire::tile_rows(FOURS, THREADS);
constexpr int EACH_GATES = (TILE * STEP + THREADS - 1) / THREADS; // that each lane copies
typedef quire::Share<T, KEY_DIM, LANES> Keys;
typedef quire::Staged<quire::Fours<T>, FOURS, TILE, THREADS> KeyTile;
typedef quire::Staged<T, PLACES, TILE, THREADS> ValueTile;
// Rows of the step, for all of the threadgroup's rows of state.
SHARED quire::Fours<T> q_tile[TILE * FOURS], k_tile[TILE * FOURS];
SHARED T v_tile[TILE * PLACES];
SHARED float g_tile[TILE * STEP], beta_tile[TILE];

const int own = int(thread_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup) % LANES;
const int head = int(threadgroup_position_in_grid.y);
const int num_segments = int(sources_shape[0]);
int segment = int(threadgroup_position_in_grid.z);
if (segment == 0 && head == 0 && threadgroup_position_in_grid.x == 0 && own == 0) {
  new_fence[0] = 1;
}
const int first_place = int(threadgroup_position_in_grid.x) * PLACES;
const int own_place = own / LANES;
const bool is_there = first_place + own_place < VALUE_DIM;
const int place = is_there ? first_place + own_place : 0;
const int width = quire::min(PLACES, VALUE_DIM - first_place);

if (segment == num_segments - 1) {
  for (int row = starts[num_segments]; row < int(q_shape[0]); ++row) {
    if (lane == 0 && is_there) y[(size_t(row) * VALUE_HEADS + head) * VALUE_DIM + place] = T(0.0f);
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

float values[Keys::SIZE]; // of a row of keys, or of queries
bool goes_on = true;
while (goes_on) {
  goes_on = segment + 1 < num_segments && sources[segment + 1] < 0;
  for (int row = first; row < end; row += TILE) {
    const int count = quire::min(TILE, end - row);
    const size_t key = (size_t(row) * KEY_HEADS + head / SHARE) * FOURS;
    const size_t at_head = size_t(row) * VALUE_HEADS + head;
    const DEVICE quire::Fours<T>* all_q = (const DEVICE quire::Fours<T>*)q;
    const DEVICE quire::Fours<T>* all_k = (const DEVICE quire::Fours<T>*)k;
    quire::Fours<T> new_q[KeyTile::EACH], new_k[KeyTile::EACH];
    T new_v[ValueTile::EACH];
    float new_g[EACH_GATES], new_beta = 0.0f;
    KeyTile::load(new_q, all_q + key, KEY_HEADS * FOURS, count, FOURS, own);
    KeyTile::load(new_k, all_k + key, KEY_HEADS * FOURS, count, FOURS, own);
    const size_t value = at_head * VALUE_DIM + first_place;
    ValueTile::load(new_v, v + value, VALUE_HEADS * VALUE_DIM, count, width, own);
    // On Metal arrays of few elements are constants, to which no function here has a pointer.
    UNROLL
    for (int n = 0; n < EACH_GATES; ++n) {
      const int i = n * THREADS + own;
      if (i < count * STEP) {
        float gate = float(g[(at_head + size_t(i / STEP) * VALUE_HEADS) * STEP + i % STEP]);
        if (RAW) gate = quire::left_of<SUM>(gate + float(dt_bias[head]), float(a_log[head]));
        new_g[n] = gate;
      }
    }
    if (own < count) {
      const float factor = float(beta[at_head + size_t(own) * VALUE_HEADS]);
      new_beta = RAW ? float(T(1.0f / (1.0f + quire::exp2(-factor * quire::LOG2_E)))) : factor;
    }
    BARRIER(); // until all have read the rows before
    KeyTile::store(q_tile, new_q, count, FOURS, own);
    KeyTile::store(k_tile, new_k, count, FOURS, own);
    ValueTile::store(v_tile, new_v, count, width, own);
    UNROLL
    for (int n = 0; n < EACH_GATES; ++n) {
      const int i = n * THREADS + own;
      if (i < count * STEP) g_tile[i] = new_g[n];
    }
    if (own < count) beta_tile[own] = new_beta;
    BARRIER();
    for (int n = 0; n < count; ++n) {
      Keys::read(k_tile + n * FOURS, lane, values);
      UNROLL
      for (int i = 0; i < int(Keys::SIZE); ++i) {
        state[i] *= g_tile[n * STEP + (VECTOR ? 4 * Keys::place(i / 4, lane) + i % 4 : 0)];
      }
      const float held = quire::sum_over<LANES>(Keys::product(state, values));
      const float delta = (float(v_tile[n * PLACES + own_place]) - held) * beta_tile[n];
      UNROLL
      for (int i = 0; i < int(Keys::SIZE); ++i) state[i] += values[i] * delta;
      Keys::read(q_tile + n * FOURS, lane, values);
      const float read = quire::sum_over<LANES>(Keys::product(state, values));
      if (lane == 0 && is_there) {
        y[(at_head + size_t(n) * VALUE_HEADS) * VALUE_DIM + place] = T(read);
      }
    }
  }
  if (target > 0 && is_there) {
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
