// Runs a kernel compiled against shim/: every thread of a threadgroup is a fiber, and gives way only
// where it waits for others. Threadgroups run one after the other.
//
//   kernel DIRECTORY GROUPS_X GROUPS_Y GROUPS_Z THREADS ORDERS BUFFERS
//
// DIRECTORY/N.bin holds buffer N before the run and, at the end, after it. Exit code 3: the kernel
// broke a rule of the simulator; the message is on stderr.

#include <unistd.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "sim_fiber.h"
#include "sim_runtime.h"

namespace metal_sim {

// Written by text.py for each kernel: calls it in the current thread.
void run_thread(const Place& place, void* const* buffers);

namespace {

constexpr size_t MAX_THREADGROUP_MEMORY = 32 << 10;
constexpr unsigned MAX_THREADS = 1024;

enum class State { ready, in_exchange, at_barrier, returned };

struct Thread {
  Fiber fiber;
  State state = State::ready;
  const char* operation = ""; // what it waits at
  int line = 0;
};

struct Simdgroup {
  uint32_t ready = 0; // one bit a lane
  uint32_t arrived = 0;
  const char* operation = "";
  int detail = 0;
  int line = 0;
  // A lane can be one exchange ahead of another that has not read its values yet, never two.
  int parity = 0;
  alignas(16) unsigned char values[2][LANES * 16];
};

struct Memory {
  void* data = nullptr;
  size_t bytes = 0;
  uint64_t filled_for = 0;
};

enum class Order { forward, backward, shuffled };

Fiber main_fiber;
std::vector<Thread> threads;
std::vector<Simdgroup> simdgroups;
std::vector<Memory> memories;
std::vector<void*> buffers;
Place place;
unsigned current = 0;
unsigned num_returned = 0;
unsigned num_at_barrier = 0;
uint64_t threadgroups_run = 0;
Order order = Order::forward;
uint64_t random_state = 1;

uint32_t random_below(uint32_t n) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t((random_state >> 33) % n);
}

const char* describe(const Thread& thread, char* text, size_t size) {
  switch (thread.state) {
    case State::ready: return "could run";
    case State::returned: return "returned";
    default: std::snprintf(text, size, "waits at %s (line %d)", thread.operation, thread.line);
  }
  return text;
}

[[noreturn]] void fail_stuck() {
  std::string report = "divergence: some threads wait for others that do not come\n";
  char text[160], other[160], line[240];
  for (unsigned first = 0; first < threads.size();) {
    const char* what = describe(threads[first], text, sizeof text);
    unsigned end = first + 1;
    while (end < threads.size() &&
           std::strcmp(what, describe(threads[end], other, sizeof other)) == 0) {
      ++end;
    }
    std::snprintf(line, sizeof line, "  threads %u to %u: %s\n", first, end - 1, what);
    report += line;
    first = end;
  }
  fail("%s", report.c_str());
}

// The next thread by the order of this run. Forward and backward let one simdgroup run as far as it
// can before another starts; shuffled changes at every turn.
unsigned pick() {
  const unsigned n = unsigned(simdgroups.size());
  const unsigned now = current / LANES;
  unsigned chosen = n;
  if (order == Order::shuffled) {
    unsigned start = random_below(n);
    for (unsigned i = 0; i < n && chosen == n; ++i) {
      if (simdgroups[(start + i) % n].ready != 0) chosen = (start + i) % n;
    }
  } else if (simdgroups[now].ready != 0) {
    chosen = now;
  } else {
    for (unsigned i = 0; i < n && chosen == n; ++i) {
      const unsigned candidate = order == Order::forward ? i : n - 1 - i;
      if (simdgroups[candidate].ready != 0) chosen = candidate;
    }
  }
  if (chosen == n) fail_stuck();
  const uint32_t ready = simdgroups[chosen].ready;
  unsigned lane = unsigned(__builtin_ctz(ready));
  if (order == Order::backward) lane = 31 - unsigned(__builtin_clz(ready));
  if (order == Order::shuffled) {
    uint32_t left = ready;
    for (uint32_t skip = random_below(uint32_t(__builtin_popcount(ready))); skip > 0; --skip) {
      left &= left - 1;
    }
    lane = unsigned(__builtin_ctz(left));
  }
  return chosen * LANES + lane;
}

void give_way() {
  const unsigned self = current;
  current = pick();
  if (current != self) switch_fibers(threads[self].fiber, threads[current].fiber);
}

// Barriers are for all threads: one that has returned never comes.
void release_barrier() {
  num_at_barrier = 0;
  for (unsigned i = 1; i < threads.size(); ++i) {
    if (threads[i].line != threads[0].line) {
      fail("divergence: threads 0 and %u meet at different barriers (lines %d and %d)", i,
           threads[0].line, threads[i].line);
    }
  }
  for (Thread& thread : threads) thread.state = State::ready;
  for (Simdgroup& simdgroup : simdgroups) simdgroup.ready = ~0u;
}

void thread_main() {
  arrive();
  for (;;) {
    Place mine = place;
    mine.thread_index = current;
    run_thread(mine, buffers.data());
    Thread& self = threads[current];
    self.state = State::returned;
    simdgroups[current / LANES].ready &= ~(1u << current % LANES);
    if (++num_returned == threads.size()) {
      switch_fibers(self.fiber, main_fiber);
    } else {
      give_way();
    }
  }
}

void make_threads(unsigned n) {
  char* stacks = allocate_stacks(n);
  if (stacks == nullptr) fail("no memory for %u stacks", n);
  threads = std::vector<Thread>(n);
  simdgroups = std::vector<Simdgroup>(n / LANES);
  for (unsigned i = 0; i < n; ++i) prepare_fiber(threads[i].fiber, stacks, i, thread_main);
}

void run_threadgroup() {
  ++threadgroups_run;
  num_returned = num_at_barrier = 0;
  for (Thread& thread : threads) thread.state = State::ready;
  for (Simdgroup& simdgroup : simdgroups) {
    simdgroup.ready = ~0u;
    simdgroup.arrived = 0;
  }
  current = order == Order::backward ? unsigned(threads.size()) - 1 : 0;
  current = pick();
  switch_fibers(main_fiber, threads[current].fiber);
}

void run_grid(unsigned run) {
  order = run == 0 ? Order::forward : run == 1 ? Order::backward : Order::shuffled;
  random_state = run;
  const unsigned total = place.groups[0] * place.groups[1] * place.groups[2];
  std::vector<unsigned> sequence(total);
  for (unsigned i = 0; i < total; ++i) sequence[i] = order == Order::backward ? total - 1 - i : i;
  if (order == Order::shuffled) {
    for (unsigned i = total; i > 1; --i) std::swap(sequence[i - 1], sequence[random_below(i)]);
  }
  for (unsigned index : sequence) {
    place.group[0] = index % place.groups[0];
    place.group[1] = index / place.groups[0] % place.groups[1];
    place.group[2] = index / place.groups[0] / place.groups[1];
    run_threadgroup();
  }
}

using Bytes = std::vector<unsigned char>;

Bytes read_file(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (file == nullptr) fail("cannot read %s", path.c_str());
  Bytes bytes;
  unsigned char part[4096];
  for (size_t n; (n = std::fread(part, 1, sizeof part, file)) > 0;) {
    bytes.insert(bytes.end(), part, part + n);
  }
  std::fclose(file);
  return bytes;
}

void write_file(const std::string& path, const Bytes& bytes) {
  std::FILE* file = std::fopen(path.c_str(), "wb");
  if (file == nullptr || std::fwrite(bytes.data(), 1, bytes.size(), file) != bytes.size()) {
    fail("cannot write %s", path.c_str());
  }
  std::fclose(file);
}

std::string buffer_path(const char* directory, size_t index) {
  return std::string(directory) + "/" + std::to_string(index) + ".bin";
}

int run_all(const char* directory, unsigned orders, size_t num_buffers) {
  std::vector<Bytes> before, after;
  for (size_t i = 0; i < num_buffers; ++i) before.push_back(read_file(buffer_path(directory, i)));
  for (unsigned run = 0; run < orders; ++run) {
    // A heap block of exactly its size each, so that AddressSanitizer sees every overrun.
    for (const Bytes& bytes : before) {
      buffers.push_back(std::malloc(bytes.size()));
      std::memcpy(buffers.back(), bytes.data(), bytes.size());
    }
    run_grid(run);
    for (size_t i = 0; i < num_buffers; ++i) {
      const unsigned char* data = static_cast<const unsigned char*>(buffers[i]);
      if (run == 0) after.emplace_back(data, data + before[i].size());
      for (size_t at = 0; at < after[i].size(); ++at) {
        if (after[i][at] != data[at]) {
          fail("the order of the threads matters: run %u leaves other bytes than run 0 in buffer "
               "%zu, from byte %zu on", run, i, at);
        }
      }
      std::free(buffers[i]);
    }
    buffers.clear();
  }
  for (size_t i = 0; i < num_buffers; ++i) write_file(buffer_path(directory, i), after[i]);
  return 0;
}

} // namespace

void fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fputs("metal_sim: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::fflush(stderr);
  _exit(3);
}

uint current_lane() { return current % LANES; }

void* threadgroup_memory(size_t bytes, int declaration) {
  if (memories.size() <= size_t(declaration)) memories.resize(size_t(declaration) + 1);
  Memory& memory = memories[size_t(declaration)];
  if (memory.data == nullptr) {
    memory.data = std::malloc(bytes);
    memory.bytes = bytes;
    size_t total = 0;
    for (const Memory& each : memories) total += each.bytes;
    if (total > MAX_THREADGROUP_MEMORY) {
      fail("%zu bytes of threadgroup memory; Metal has %zu", total, MAX_THREADGROUP_MEMORY);
    }
  }
  if (memory.filled_for != threadgroups_run) {
    std::memset(memory.data, 0xff, bytes);
    memory.filled_for = threadgroups_run;
  }
  return memory.data;
}

const unsigned char* exchange(
    const char* operation, int detail, int line, const void* value, size_t bytes) {
  Thread& self = threads[current];
  Simdgroup& simdgroup = simdgroups[current / LANES];
  const uint32_t bit = 1u << current % LANES;
  if (simdgroup.arrived == 0) {
    simdgroup.operation = operation;
    simdgroup.detail = detail;
    simdgroup.line = line;
  } else if (simdgroup.line != line || simdgroup.detail != detail ||
             std::strcmp(simdgroup.operation, operation) != 0) {
    fail("divergence: thread %u calls %s (line %d, argument %d) where other lanes of its simdgroup "
         "called %s (line %d, argument %d)", current, operation, line, detail, simdgroup.operation,
         simdgroup.line, simdgroup.detail);
  }
  const int parity = simdgroup.parity;
  std::memcpy(simdgroup.values[parity] + 16 * (current % LANES), value, bytes);
  simdgroup.arrived |= bit;
  if (simdgroup.arrived == ~0u) {
    simdgroup.arrived = 0;
    simdgroup.parity ^= 1;
    for (unsigned i = 0; i < LANES; ++i) threads[current / LANES * LANES + i].state = State::ready;
    simdgroup.ready = ~0u;
  } else {
    self.state = State::in_exchange;
    self.operation = operation;
    self.line = line;
    simdgroup.ready &= ~bit;
  }
  give_way();
  return simdgroup.values[parity];
}

void threadgroup_barrier(int line) {
  Thread& self = threads[current];
  self.state = State::at_barrier;
  self.operation = "threadgroup_barrier";
  self.line = line;
  simdgroups[current / LANES].ready &= ~(1u << current % LANES);
  if (++num_at_barrier == threads.size()) release_barrier();
  give_way();
}

} // namespace metal_sim

int main(int argc, char** argv) {
  using namespace metal_sim;
  if (argc != 8) fail("seven arguments are needed");
  for (int i = 0; i < 3; ++i) place.groups[i] = unsigned(std::atoi(argv[2 + i]));
  place.threads = unsigned(std::atoi(argv[5]));
  if (place.threads == 0 || place.threads % LANES != 0 || place.threads > MAX_THREADS) {
    fail("%u threads: a multiple of 32 up to %u is needed", place.threads, MAX_THREADS);
  }
  make_threads(place.threads);
  return run_all(argv[1], unsigned(std::atoi(argv[6])), size_t(std::atoi(argv[7])));
}
