// The dropout mask: Philox4x32-10 (Salmon et al., 2011), eight 16-bit draws a counter, so that any part of a
// mask can be made again from its seed.
#pragma once
#include "launch.h"

namespace pk {

__host__ __device__ __forceinline__ uint32_t high_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return (uint32_t)((uint64_t)a * b >> 32);
#endif
}

// The draws of columns 8 * group ... 8 * group + 7 of `row`, two a word, the earlier in the low half.
__host__ __device__ __forceinline__ void philox(uint64_t seed, uint32_t group, uint32_t row,
                                                uint32_t (&draws)[4]) {
  uint32_t c0 = group, c1 = row, c2 = 0, c3 = 0, key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint32_t high0 = high_product(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = high_product(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  draws[0] = c0, draws[1] = c1, draws[2] = c2, draws[3] = c3;
}

struct Dropout {
  uint32_t threshold;  // a draw below it is dropped; 0: no dropout
  float scale;         // 1 / (1 - p)
  uint64_t seed;

  static float scale_of(uint32_t threshold) {
    return threshold >= 65536 ? 0.0f : 65536.0f / (float)(65536 - threshold);
  }
  // values[i] of columns 8 * group + i of `row`, times the mask's scale or 0.
  __host__ __device__ __forceinline__ void apply(uint32_t group, uint32_t row, float (&values)[8]) const {
    uint32_t draws[4];
    philox(seed, group, row, draws);
#pragma unroll
    for (int i = 0; i < 8; i++)
      values[i] *= (draws[i / 2] >> 16 * (i % 2) & 0xffff) >= threshold ? scale : 0.0f;
  }
};

}  // namespace pk
