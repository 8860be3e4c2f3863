// Counters in shared memory, in CUDA's words. metal_counters.h says the same in Metal's.

namespace quire {

// A number in shared memory that all threads add to.
typedef unsigned SharedCounter;
FUNC void set(SharedCounter& counter, unsigned x) { counter = x; }
FUNC unsigned get(SharedCounter& counter) { return counter; }
FUNC void add(SharedCounter& counter, unsigned x) { atomicAdd(&counter, x); }

} // namespace quire
