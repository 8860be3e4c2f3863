// Mamba-2's recurrence over segments of rows, row after row, with the states in registers.
// LANES lanes have one row of a state, which knows nothing of its other rows; a simdgroup has
// 32 / LANES of them. Threadgroups: parts of a head's rows of state, heads, segments. The pool is
// an input, so MLX believes it is only read: whoever uses it next takes `new_fence` as an input.

constexpr int ROWS = 32 / LANES;
constexpr int PLACES = ROWS * SIMDGROUPS; // rows of state of a threadgroup
constexpr int THREADS = 32 * SIMDGROUPS;
constexpr int SHARE = HEADS / GROUPS;
constexpr int FOURS = STATE_DIM / 4;
constexpr int TILE = quire::tile_rows(FOURS, THREADS);
typedef quire::Share<T, STATE_DIM, LANES> States;
typedef quire::Staged<quire::Fours<T>, FOURS, TILE, THREADS> StateTile;
typedef quire::Staged<T, PLACES, TILE, THREADS> ValueTile;
// Rows of the step, for all of the threadgroup's rows of state.
SHARED quire::Fours<T> b_tile[TILE * FOURS], c_tile[TILE * FOURS];
SHARED T x_tile[TILE * PLACES];
SHARED float dt_tile[TILE];

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
const bool is_there = first_place + own_place < HEAD_DIM;
const int place = is_there ? first_place + own_place : 0;
const int width = quire::min(PLACES, HEAD_DIM - first_place);

if (segment == num_segments - 1) {
  for (int row = starts[num_segments]; row < int(x_shape[0]); ++row) {
    if (lane == 0 && is_there) y[(size_t(row) * HEADS + head) * HEAD_DIM + place] = T(0.0f);
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

float values[States::SIZE]; // of a row of b, or of c
bool goes_on = true;
while (goes_on) {
  goes_on = segment + 1 < num_segments && sources[segment + 1] < 0;
  for (int row = first; row < end; row += TILE) {
    const int count = quire::min(TILE, end - row);
    const size_t group = (size_t(row) * GROUPS + head / SHARE) * FOURS;
    const size_t at_head = size_t(row) * HEADS + head;
    const DEVICE quire::Fours<T>* all_b = (const DEVICE quire::Fours<T>*)b;
    const DEVICE quire::Fours<T>* all_c = (const DEVICE quire::Fours<T>*)c;
    quire::Fours<T> new_b[StateTile::EACH], new_c[StateTile::EACH];
    T new_x[ValueTile::EACH];
    float new_dt = 0.0f;
    StateTile::load(new_b, all_b + group, GROUPS * FOURS, count, FOURS, own);
    StateTile::load(new_c, all_c + group, GROUPS * FOURS, count, FOURS, own);
    const size_t value = at_head * HEAD_DIM + first_place;
    ValueTile::load(new_x, x + value, HEADS * HEAD_DIM, count, width, own);
    // On Metal arrays of few elements are constants, to which no function here has a pointer.
    if (own < count) new_dt = dt[at_head + size_t(own) * HEADS];
    BARRIER(); // until all have read the rows before
    StateTile::store(b_tile, new_b, count, FOURS, own);
    StateTile::store(c_tile, new_c, count, FOURS, own);
    ValueTile::store(x_tile, new_x, count, width, own);
    if (own < count) dt_tile[own] = new_dt;
    BARRIER();
    for (int n = 0; n < count; ++n) {
      States::read(b_tile + n * FOURS, lane, values);
      const float step = dt_tile[n];
      const float whole = float(x_tile[n * PLACES + own_place]);
      const float decay = quire::exp2(rate * step);
      const float taken = whole * step;
      UNROLL
      for (int i = 0; i < int(States::SIZE); ++i) state[i] = state[i] * decay + taken * values[i];
      States::read(c_tile + n * FOURS, lane, values);
      const float given = quire::sum_over<LANES>(States::product(state, values)) + around * whole;
      if (lane == 0 && is_there) {
        y[(at_head + size_t(n) * HEADS) * HEAD_DIM + place] = T(given);
      }
    }
  }
  if (target > 0 && is_there) {
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
