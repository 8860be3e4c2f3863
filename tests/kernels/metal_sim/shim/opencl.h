// What kernels use of metal_stdlib, declared in OpenCL C++ for address_spaces.py. Nothing runs.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned long size_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef half half2 __attribute__((ext_vector_type(2)));
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef half float16_t;
// Any scalar of two bytes that is no other's name.
typedef short bfloat;
typedef bfloat bfloat16_t;

namespace metal {

template <typename To, typename From>
To as_type(From x);

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
template <typename T>
T simd_shuffle(T, ushort);
template <typename T>
T simd_shuffle_xor(T, ushort);
bool simd_any(bool);

namespace fast {
float exp2(float);
}
namespace precise {
float cos(float);
float log2(float);
float rsqrt(float);
float sin(float);
float tanh(float);
} // namespace precise

enum memory_order { memory_order_relaxed };
template <typename T>
struct atomic {
  T value;
};
typedef atomic<uint> atomic_uint;
uint atomic_load_explicit(threadgroup atomic_uint*, memory_order);
void atomic_store_explicit(threadgroup atomic_uint*, uint, memory_order);
uint atomic_fetch_add_explicit(threadgroup atomic_uint*, uint, memory_order);

template <typename T, int Columns, int Rows>
struct simdgroup_matrix {
  T elements[2];
  thread T* thread_elements();
};
template <typename M>
void simdgroup_multiply_accumulate(thread M& d, M a, M b, M c);

} // namespace metal

namespace metal_sim {
template <typename T>
threadgroup T& shared(int);
}

using namespace metal;
