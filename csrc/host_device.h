// What code for the host and for a GPU shares: how its functions are declared, and whole-number arithmetic.
#pragma once
#include <stdint.h>

// A function of both, with no state. On the host it is static, so that every translation unit, and with it
// every ISA, has its own.
#if defined(__CUDACC__)
#define PK_HOST_DEVICE __host__ __device__ __forceinline__
#define PK_UNROLL _Pragma("unroll")
#else
#define PK_HOST_DEVICE static inline
#define PK_UNROLL
#endif

namespace pk {

PK_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PK_HOST_DEVICE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
PK_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PK_HOST_DEVICE int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace pk
