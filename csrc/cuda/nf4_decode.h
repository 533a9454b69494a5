// Decoding 4-bit codes in registers. Two forms, both for whatever 16 codes are passed (NF4, FP4 or others):
// nothing here knows a table.
//
// Planes: unscaled 16-bit codes by byte permutes, for products whose fp32 sum over a block is then multiplied
// by the block's fp32 absmax. The weight so used is T(code) * absmax; its rms error for NF4 in bf16 is 0.138
// %, against 0.165 % of T(code * absmax), which rounds the product, and 0.255 % of T(T(code) * T(absmax)).
//
// PairTable: fp32 codes, exact, two a lookup: fp32(code) * fp32(absmax), or a block's sum of fp32(code) * x
// times its absmax. Nothing is rounded to 16 bits.
#pragma once
#include "ptx.h"

namespace pk {

// Byte i of `high` (16 bytes in four words) is the upper byte of the 16-bit code i, of `low` the lower.
struct Planes {
  uint32_t high[4], low[4];
};

// Of 16 codes in 16 bits, two a word, the earlier in the low half.
__host__ __device__ __forceinline__ Planes planes_of(const uint32_t (&pairs)[8]) {
  Planes planes;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    planes.low[i] = prmt(pairs[2 * i], pairs[2 * i + 1], 0x6420);
    planes.high[i] = prmt(pairs[2 * i], pairs[2 * i + 1], 0x7531);
  }
  return planes;
}

// Of the device's code table fp32 [16], each code rounded once to bf16 or fp16.
template <bool BF16>
__device__ __forceinline__ Planes load_planes(const float* code) {
  uint32_t pairs[8];
#pragma unroll
  for (int i = 0; i < 8; i++)
    pairs[i] = BF16 ? pack_bf16x2(code[2 * i], code[2 * i + 1]) : pack_f16x2(code[2 * i], code[2 * i + 1]);
  return planes_of(pairs);
}

// Four packed bytes, read as a little-endian word, hold the codes c0 ... c7, each byte's first in its high
// nibble -> pairs[i] = {c[2i + 1], c[2i]}, the earlier in the low half. Bits 0-2 of a nibble select within a
// half of the table, bit 3 selects the half: 16 permutes and 5 other operations, 2.6 a code.
__host__ __device__ __forceinline__ void decode8(uint32_t q, const Planes& planes, uint32_t (&pairs)[4]) {
  const uint32_t within = q & 0x77777777u, half = (q >> 1 & 0x44444444u) | 0x32103210u;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    // A permute reads the low 16 bits: four nibbles.
    const uint32_t index = within >> 16 * i, select = half >> 16 * i;
    const uint32_t high = prmt(prmt(planes.high[0], planes.high[1], index),
                               prmt(planes.high[2], planes.high[3], index), select);
    const uint32_t low =
        prmt(prmt(planes.low[0], planes.low[1], index), prmt(planes.low[2], planes.low[3], index), select);
    pairs[2 * i] = prmt(low, high, 0x4051);  // nibbles 1 and 0: within a byte the high nibble comes first
    pairs[2 * i + 1] = prmt(low, high, 0x6273);
  }
}

// Both fp32 codes of every byte, in shared memory, COPIES times: lane l reads copy l % COPIES, so that the 16
// lanes that an 8-byte access serves at once hit 16 different pairs of banks, whatever their bytes are.
struct PairTable {
  static constexpr int COPIES = 16, BYTES = 256 * COPIES * (int)sizeof(float2);

  float2* entries;  // [256][COPIES]

  // By all threads of the block; a barrier must follow.
  __device__ __forceinline__ void fill(const float* code) const {
    for (int i = threadIdx.x; i < 256 * COPIES; i += blockDim.x)
      entries[i] = make_float2(code[i / COPIES >> 4], code[i / COPIES & 15]);
  }
  // The copy that a lane reads, by the whole warp. Through a shuffle, or ptxas masks the lane number again at
  // every lookup: 1 of 6 operations there.
  __device__ __forceinline__ static uint32_t copy_of(int lane) {
    return __shfl_sync(0xffffffffu, (uint32_t)lane % COPIES, lane);
  }
  // Of byte `i` of a word: {first, second} code. The shift brings the byte to where its entries start.
  __device__ __forceinline__ float2 lookup(uint32_t q, int i, uint32_t copy) const {
    static_assert(COPIES == 16, "the shift is by its logarithm");
    const uint32_t byte = i == 0 ? q << 4 : q >> (8 * i - 4);
    return entries[(byte & 255 * COPIES) | copy];
  }
};

}  // namespace pk
