// Stacks of their own for the threads of a kernel, all in one thread of the system.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstring>

#if !defined(__x86_64__) || defined(METAL_SIM_UCONTEXT)
#include <ucontext.h>
#endif

extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}

namespace metal_sim {

constexpr size_t STACK = 256 << 10;
constexpr size_t GUARD = 64 << 10; // below each stack; nobody may touch it

#if defined(__x86_64__) && !defined(METAL_SIM_UCONTEXT)
struct Context {
  void* stack_pointer = nullptr;
};
// swapcontext() without its system call: keeps what the calling convention has the callee keep.
extern "C" void metal_sim_switch(void** from, void* to) __asm__("metal_sim_switch");
__asm__(R"(
.text
metal_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
inline void switch_context(Context& from, Context& to) {
  metal_sim_switch(&from.stack_pointer, to.stack_pointer);
}
inline void prepare_context(Context& context, char* stack, void (*entry)()) {
  // Six saved registers, where to return to, and the place of a caller's return address.
  void** top = reinterpret_cast<void**>(stack + STACK) - 8;
  std::memset(top, 0, 8 * sizeof(void*));
  top[6] = reinterpret_cast<void*>(entry);
  context.stack_pointer = top;
}
#else
struct Context {
  ucontext_t saved;
};
inline void switch_context(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }
inline void prepare_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = STACK;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
}
#endif

struct Fiber {
  Context context;
  const void* bottom = nullptr; // of its stack
  size_t size = 0;
  void* fake_stack = nullptr;
};

// Where the running fiber came from.
static Fiber* previous = nullptr;

// A fiber's first act. AddressSanitizer tells where the stack is that it came from.
inline void arrive() {
  __sanitizer_finish_switch_fiber(nullptr, &previous->bottom, &previous->size);
}

inline void switch_fibers(Fiber& from, Fiber& to) {
  previous = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
  switch_context(from.context, to.context);
  __sanitizer_finish_switch_fiber(from.fake_stack, &previous->bottom, &previous->size);
}

// Room for n stacks, or null.
inline char* allocate_stacks(unsigned n) {
  void* stacks = mmap(nullptr, (GUARD + STACK) * n, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return stacks == MAP_FAILED ? nullptr : static_cast<char*>(stacks);
}

// Let the fiber begin with entry(), which must not return, on the index-th of the stacks.
inline void prepare_fiber(Fiber& fiber, char* stacks, unsigned index, void (*entry)()) {
  char* guard = stacks + index * (GUARD + STACK);
  mprotect(guard, GUARD, PROT_NONE);
  fiber.bottom = guard + GUARD;
  fiber.size = STACK;
  prepare_context(fiber.context, guard + GUARD, entry);
}

} // namespace metal_sim
