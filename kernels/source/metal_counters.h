// Counters in shared memory, in Metal's words. cuda_counters.h says the same in CUDA's.

namespace quire {

// A number in shared memory that all threads add to.
typedef metal::atomic_uint SharedCounter;
FUNC void set(threadgroup SharedCounter& counter, uint x) {
  metal::atomic_store_explicit(&counter, x, metal::memory_order_relaxed);
}
FUNC uint get(threadgroup SharedCounter& counter) {
  return metal::atomic_load_explicit(&counter, metal::memory_order_relaxed);
}
FUNC void add(threadgroup SharedCounter& counter, uint x) {
  metal::atomic_fetch_add_explicit(&counter, x, metal::memory_order_relaxed);
}

} // namespace quire
