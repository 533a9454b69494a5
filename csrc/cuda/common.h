// What every kernel needs: number types, and the view of a weight.
#pragma once
#include "../checks.h"
#include "ptx.h"

namespace pk {

// 16-bit numbers as bits: cuda_bf16.h and cuda_fp16.h are not needed, and the emulator has the same types.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return bf16_value(v.bits); }
__device__ __forceinline__ float to_float(f16 v) { return f16_value(v.bits); }

// Two numbers in one register, rounded to T, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
  return pack_bf16x2(low, high);
}
template <>
__device__ __forceinline__ uint32_t pack2<f16>(float low, float high) {
  return pack_f16x2(low, high);
}

__device__ __forceinline__ void store(float v, float* out) { *out = v; }
__device__ __forceinline__ void store(float v, bf16* out) { out->bits = (uint16_t)pack_bf16x2(v, v); }
__device__ __forceinline__ void store(float v, f16* out) { out->bits = (uint16_t)pack_f16x2(v, v); }

inline bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// The kernels' view of a 4-bit weight that has been checked.
inline Weight view_of(const pk_weight& w) {
  return {static_cast<const uint8_t*>(w.data),
          w.code,
          w.absmax,
          w.absmax_8bit,
          w.absmax_code,
          w.nested_absmax,
          w.absmax_offset,
          log2_of(w.blocksize),
          w.absmax ? 0 : log2_of(w.nested_blocksize)};
}

}  // namespace pk
