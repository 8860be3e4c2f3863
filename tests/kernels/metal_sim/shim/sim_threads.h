// Simdgroup operations, barriers, atomics and threadgroup memory, over the fibers of runtime.cpp.
#pragma once

#include "sim_runtime.h"

namespace metal_sim {

template <typename T>
inline T& shared(int declaration) {
  return *static_cast<T*>(threadgroup_memory(sizeof(T), declaration));
}

template <typename T>
struct Values {
  const unsigned char* data;
  T operator[](uint lane) const {
    T value;
    std::memcpy(static_cast<void*>(&value), data + 16 * size_t(lane), sizeof(T));
    return value;
  }
};

template <typename T>
inline Values<T> exchange_all(const char* operation, int detail, int line, T value) {
  static_assert(sizeof(T) <= 16, "no simd operation takes more than 16 bytes");
  return Values<T>{exchange(operation, detail, line, &value, sizeof(T))};
}

// A value no lane has: all bits set, which is NaN or -1.
template <typename T>
inline T undefined_value() {
  T value;
  std::memset(static_cast<void*>(&value), 0xff, sizeof(T));
  return value;
}

template <typename T, typename F>
inline T reduce(const char* operation, int line, T value, F combine) {
  const Values<T> values = exchange_all(operation, 0, line, value);
  T all[LANES];
  for (uint i = 0; i < LANES; ++i) all[i] = values[i];
  for (uint step = LANES / 2; step > 0; step /= 2) {
    for (uint i = 0; i < step; ++i) all[i] = combine(all[i], all[i + step]);
  }
  return all[0];
}

} // namespace metal_sim

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

inline void threadgroup_barrier(mem_flags, int line = __builtin_LINE()) {
  metal_sim::threadgroup_barrier(line);
}
inline void simdgroup_barrier(mem_flags, int line = __builtin_LINE()) {
  metal_sim::exchange_all("simdgroup_barrier", 0, line, 0);
}

template <typename T>
inline T simd_shuffle(T x, ushort lane, int line = __builtin_LINE()) {
  const auto values = metal_sim::exchange_all("simd_shuffle", 0, line, x);
  if (lane >= metal_sim::LANES) metal_sim::fail("simd_shuffle from lane %d (line %d)", lane, line);
  return values[lane];
}
template <typename T>
inline T simd_broadcast(T x, ushort lane, int line = __builtin_LINE()) {
  return metal_sim::exchange_all("simd_broadcast", lane, line, x)[lane];
}
template <typename T>
inline T simd_broadcast_first(T x, int line = __builtin_LINE()) {
  return metal_sim::exchange_all("simd_broadcast_first", 0, line, x)[0];
}
template <typename T>
inline T simd_shuffle_xor(T x, ushort mask, int line = __builtin_LINE()) {
  const auto values = metal_sim::exchange_all("simd_shuffle_xor", mask, line, x);
  const uint lane = metal_sim::current_lane() ^ mask;
  if (lane >= metal_sim::LANES) metal_sim::fail("simd_shuffle_xor by %d (line %d)", mask, line);
  return values[lane];
}
// Lanes without a partner get a value that no lane has.
template <typename T>
inline T simd_shuffle_down(T x, ushort delta, int line = __builtin_LINE()) {
  const auto values = metal_sim::exchange_all("simd_shuffle_down", delta, line, x);
  const uint lane = metal_sim::current_lane() + delta;
  return lane < metal_sim::LANES ? values[lane] : metal_sim::undefined_value<T>();
}
template <typename T>
inline T simd_shuffle_up(T x, ushort delta, int line = __builtin_LINE()) {
  const auto values = metal_sim::exchange_all("simd_shuffle_up", delta, line, x);
  const uint lane = metal_sim::current_lane() - delta;
  return lane < metal_sim::LANES ? values[lane] : metal_sim::undefined_value<T>();
}

template <typename T>
inline T simd_sum(T x, int line = __builtin_LINE()) {
  return metal_sim::reduce("simd_sum", line, x, [](T a, T b) { return T(a + b); });
}
template <typename T>
inline T simd_max(T x, int line = __builtin_LINE()) {
  return metal_sim::reduce("simd_max", line, x, [](T a, T b) { return a < b ? b : a; });
}
template <typename T>
inline T simd_min(T x, int line = __builtin_LINE()) {
  return metal_sim::reduce("simd_min", line, x, [](T a, T b) { return b < a ? b : a; });
}
template <typename T>
inline T simd_or(T x, int line = __builtin_LINE()) {
  return metal_sim::reduce("simd_or", line, x, [](T a, T b) { return T(a | b); });
}
inline bool simd_any(bool x, int line = __builtin_LINE()) {
  return metal_sim::reduce("simd_any", line, x, [](bool a, bool b) { return a || b; });
}
inline bool simd_all(bool x, int line = __builtin_LINE()) {
  return metal_sim::reduce("simd_all", line, x, [](bool a, bool b) { return a && b; });
}
struct simd_vote {
  uint64_t votes;
  explicit operator uint64_t() const { return votes; }
};
inline simd_vote simd_ballot(bool x, int line = __builtin_LINE()) {
  const auto values = metal_sim::exchange_all("simd_ballot", 0, line, x);
  uint64_t votes = 0;
  for (uint i = 0; i < metal_sim::LANES; ++i) votes |= uint64_t(values[i]) << i;
  return simd_vote{votes};
}
template <typename T>
inline T simd_prefix_inclusive_sum(T x, int line = __builtin_LINE()) {
  const auto values = metal_sim::exchange_all("simd_prefix_inclusive_sum", 0, line, x);
  T sum = values[0];
  for (uint i = 1; i <= metal_sim::current_lane(); ++i) sum = T(sum + values[i]);
  return sum;
}
template <typename T>
inline T simd_prefix_exclusive_sum(T x, int line = __builtin_LINE()) {
  const auto values = metal_sim::exchange_all("simd_prefix_exclusive_sum", 0, line, x);
  T sum = T(0);
  for (uint i = 0; i < metal_sim::current_lane(); ++i) sum = T(sum + values[i]);
  return sum;
}

// Fibers give way at the operations above only, so plain reads and writes are atomic.
enum memory_order { memory_order_relaxed };

template <typename T>
struct atomic {
  T value;
};
typedef atomic<uint> atomic_uint;
typedef atomic<int> atomic_int;

template <typename T>
inline T atomic_load_explicit(const volatile atomic<T>* a, memory_order) { return a->value; }
template <typename T, typename U>
inline void atomic_store_explicit(volatile atomic<T>* a, U x, memory_order) { a->value = T(x); }

#define METAL_SIM_FETCH(name, expression)                                     \
  template <typename T, typename U>                                           \
  inline T atomic_fetch_##name##_explicit(volatile atomic<T>* a, U u, memory_order) { \
    const T old = a->value, x = T(u);                                         \
    a->value = T(expression);                                                 \
    return old;                                                               \
  }
METAL_SIM_FETCH(add, old + x)
METAL_SIM_FETCH(sub, old - x)
METAL_SIM_FETCH(or, old | x)
METAL_SIM_FETCH(and, old & x)
METAL_SIM_FETCH(max, old < x ? x : old)
METAL_SIM_FETCH(min, x < old ? x : old)
#undef METAL_SIM_FETCH
template <typename T, typename U>
inline T atomic_exchange_explicit(volatile atomic<T>* a, U x, memory_order) {
  const T old = a->value;
  a->value = T(x);
  return old;
}

} // namespace metal
