// What every kernel needs: number types, the absmax of a block, and the checks of a weight's descriptor.
#pragma once
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

// A 4-bit weight as kernels take it, by value.
struct Weight {
  const uint8_t* packed;  // [(n*k+1)/2]
  const float* code;      // [16]
  const float* absmax;    // [blocks], or null where nested:
  const uint8_t* absmax_8bit;
  const float* absmax_code;    // [256]
  const float* nested_absmax;  // [blocks >> nested_shift]
  const float* absmax_offset;  // [1]
  int shift, nested_shift;     // log2 of the block sizes
};

// The fp32 absmax of a block; multiply and add are rounded separately, as bitsandbytes does: the compiler
// must not fuse them.
__device__ __forceinline__ float absmax_of(const Weight& w, int64_t block) {
  if (w.absmax) return __ldg(w.absmax + block);
  const float scaled = __fmul_rn(__ldg(w.absmax_code + __ldg(w.absmax_8bit + block)),
                                 __ldg(w.nested_absmax + (block >> w.nested_shift)));
  return __fadd_rn(scaled, __ldg(w.absmax_offset));
}

// Element i's code index: the first element of a byte is in the high nibble.
__host__ __device__ __forceinline__ int nibble(const uint8_t* packed, int64_t i) {
  return i & 1 ? packed[i >> 1] & 15 : packed[i >> 1] >> 4;
}

inline bool bad_dtype(int dtype) { return dtype != PK_F32 && dtype != PK_BF16 && dtype != PK_F16; }
inline bool bad_block(int64_t size, int64_t low, int64_t high) {
  return size < low || size > high || (size & (size - 1));
}
inline bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

inline int log2_of(int32_t power) {
  int shift = 0;
  while (power >> (shift + 1)) shift++;
  return shift;
}

// Checks the descriptor of a 4-bit weight and makes the kernels' view of it.
inline int view_weight(const pk_weight* w, Weight* view) {
  if (!w || !w->data || !w->code) return PK_ERR_NULL;
  if (w->n < 0 || w->k < 1) return PK_ERR_SHAPE;
  if (bad_block(w->blocksize, 32, 4096)) return PK_ERR_BLOCKSIZE;
  if (!w->absmax) {
    if (!w->absmax_8bit || !w->absmax_code || !w->nested_absmax || !w->absmax_offset) return PK_ERR_NULL;
    if (bad_block(w->nested_blocksize, 1, 1 << 30)) return PK_ERR_BLOCKSIZE;
  }
  *view = {static_cast<const uint8_t*>(w->data),
           w->code,
           w->absmax,
           w->absmax_8bit,
           w->absmax_code,
           w->nested_absmax,
           w->absmax_offset,
           log2_of(w->blocksize),
           w->absmax ? 0 : log2_of(w->nested_blocksize)};
  return PK_OK;
}

}  // namespace pk
