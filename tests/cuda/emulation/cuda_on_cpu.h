// CUDA C++ as plain C++: every thread of a block is a fiber, switched at barriers and warp-wide operations. What it checks:
//   barriers          all threads of a block must reach the same one; one that some thread missed, or left by returning, fails the launch
//   warp operations   all living lanes of the mask must reach the same one
//   shared memory     filled with 0xff (NaN) at block start, allocated to the byte; PK_SHARED and dynamic_shared() only
//   cp.async          the target holds 0xff from the issue to the wait that covers the copy
//   alignment         vectors at addresses where the hardware would fault (compiled with -fsanitize=alignment, whose handler is ours)
//   order of threads  set by pk_emulation_order(): a missing barrier shows in one order or another
// It does not model time, caches, the order of stores to global memory, or how the hardware adds up a matrix product.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using uint3 = dim3;

// clang-format off
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
// clang-format on

namespace pk_emulated {

struct Position { dim3 thread, block; };
struct Extent { dim3 block, grid; };
extern __thread Position* position;  // of the running fiber
extern __thread Extent* extent;

// Operands of the lanes, null where a lane takes no part.
using Combine = void (*)(void* const lanes[32]);

void barrier(const char* file, int line);
// Waits for the mask's lanes, then `combine` is run once over all lanes' operands, which hold inputs and results.
void collective(const char* name, unsigned mask, bool whole_warp, void* operand, Combine combine);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void* shared_array(const void* identity, size_t bytes);
bool in_shared(const void* p, size_t bytes);
void need_aligned(const char* name, const void* p);  // fail the launch where it is not so
void need_shared(const char* name, const void* p);
unsigned char* dynamic_shared();
void launch(dim3 grid, unsigned threads, size_t shared_bytes, const void* kernel, const std::function<void()>& body);

uint4 load16(const void* address);
void copy_async16(void* shared, const void* global, bool valid);
void copy_async_commit();
void copy_async_wait(int newest);
void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bf16);

uint16_t half_bits(float value);
float half_value(uint16_t bits);
int lane();

// A shuffle: what the lane gives, where it reads, what it gets.
struct Shuffle {
  uint64_t value;
  int source;  // of the 32 lanes
  uint64_t result;
};
void combine_shuffle(void* const lanes[32]);

template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a shuffle moves up to 8 bytes");
  Shuffle s = {0, source, 0};
  memcpy(&s.value, &value, sizeof value);
  collective(name, mask, false, &s, combine_shuffle);
  memcpy(&value, &s.result, sizeof value);
  return value;
}

// The lane `to`, or this one where `to` lies outside the segment of `width` lanes.
inline int within(int to, int width) { return to >= lane() / width * width && to < lane() / width * width + width ? to : lane(); }

unsigned ballot(const char* name, unsigned mask, bool vote);

}  // namespace pk_emulated

#define threadIdx (pk_emulated::position->thread)
#define blockIdx (pk_emulated::position->block)
#define blockDim (pk_emulated::extent->block)
#define gridDim (pk_emulated::extent->grid)
constexpr int warpSize = 32;

#define __syncthreads() pk_emulated::barrier(__FILE__, __LINE__)
static inline void __syncwarp(unsigned mask = 0xffffffffu) {
  pk_emulated::collective("__syncwarp", mask, false, nullptr, [](void* const*) {});
}
template <typename T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  return pk_emulated::shuffle("__shfl_sync", mask, v, pk_emulated::lane() / width * width + (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32) {
  return pk_emulated::shuffle("__shfl_xor_sync", mask, v, pk_emulated::within(pk_emulated::lane() ^ lanes, width));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) {
  return pk_emulated::shuffle("__shfl_down_sync", mask, v, pk_emulated::within(pk_emulated::lane() + (int)by, width));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32) {
  return pk_emulated::shuffle("__shfl_up_sync", mask, v, pk_emulated::within(pk_emulated::lane() - (int)by, width));
}
static inline unsigned __ballot_sync(unsigned mask, int vote) { return pk_emulated::ballot("__ballot_sync", mask, vote != 0); }
static inline int __any_sync(unsigned mask, int vote) { return pk_emulated::ballot("__any_sync", mask, vote != 0) != 0; }
static inline int __all_sync(unsigned mask, int vote) { return pk_emulated::ballot("__all_sync", mask, vote == 0) == 0; }

// Arithmetic: this file's users are compiled with -ffp-contract=off, so that a * b + c is two roundings, and __fmaf_rn is one.
static inline float __uint_as_float(unsigned bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline unsigned __float_as_uint(float f) { unsigned bits; memcpy(&bits, &f, 4); return bits; }
static inline float __int_as_float(int bits) { return __uint_as_float((unsigned)bits); }
static inline int __float_as_int(float f) { return (int)__float_as_uint(f); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
static inline int __ffs(int v) { return __builtin_ffs(v); }
template <typename T> T __ldg(const T* p) { return *p; }
template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }
static inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = (uint64_t)high << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned nibble = selector >> 4 * i & 15, byte = (unsigned)(bytes >> 8 * (nibble & 7)) & 0xff;
    result |= (nibble & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
  }
  return result;
}

// The runtime, as far as launchers use it. There is one device; its limits are sm_86's.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

extern "C" {
// 0: threads in ascending order, each warp as far as it gets; 1: descending; from 2 on: the seed of a shuffled order, all warps in turn.
__attribute__((visibility("default"))) void pk_emulation_order(unsigned order);
// The compute capability that cudaDeviceGetAttribute answers, such as 75; 86 at first.
__attribute__((visibility("default"))) void pk_emulation_capability(int capability);
// Launches since the library was loaded.
__attribute__((visibility("default"))) int64_t pk_emulation_launches();
// Where the kernels lie that were launched since then, in bytes from the library's start; how many they are.
__attribute__((visibility("default"))) int64_t pk_emulation_kernels(uint64_t* offsets, int64_t room);
}
