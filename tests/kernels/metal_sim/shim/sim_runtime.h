// What a compiled kernel and runtime.cpp know of each other.
#pragma once

#include <cstddef>
#include <cstdint>

namespace metal_sim {

constexpr unsigned LANES = 32;

// Where a thread is; threadgroups are one-dimensional.
struct Place {
  unsigned group[3], groups[3];
  unsigned thread_index, threads;
};

// Bytes of threadgroup memory, the same for every thread of a threadgroup and filled with 0xff at
// its start. Each declaration of the kernel has a number of its own.
void* threadgroup_memory(size_t bytes, int declaration);

// Waits until all lanes of the simdgroup have called with the same operation, detail and line.
// Gives their values, 16 bytes apart; they last until the lane's next exchange.
const unsigned char* exchange(
    const char* operation, int detail, int line, const void* value, size_t bytes);
void threadgroup_barrier(int line);
unsigned current_lane();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

} // namespace metal_sim
