// The dropout mask: Philox4x32-10 (Salmon et al., 2011), eight 16-bit draws a counter, so that any part of a
// mask can be made again from its seed. The scalar form, of the host and of GPUs, and the numbers that
// cpu/dropout_impl.h's vectors share.
#pragma once
#include "host_device.h"

namespace pk {

constexpr int PHILOX_ROUNDS = 10;
constexpr uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t PHILOX_W0 = 0x9E3779B9u, PHILOX_W1 = 0xBB67AE85u;  // what a round adds to the keys
constexpr uint32_t EVERY_DRAW = 65536;  // draws have 16 bits: a threshold of so many drops all

PK_HOST_DEVICE uint32_t high_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return (uint32_t)((uint64_t)a * b >> 32);
#endif
}

// The draws of columns 8 * group ... 8 * group + 7 of `row`, two a word, the earlier in the low half.
PK_HOST_DEVICE void philox(uint64_t seed, uint32_t group, uint32_t row, uint32_t (&draws)[4]) {
  uint32_t c0 = group, c1 = row, c2 = 0, c3 = 0, key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  PK_UNROLL
  for (int round = 0; round < PHILOX_ROUNDS; round++) {
    const uint32_t high0 = high_product(c0, PHILOX_M0), low0 = c0 * PHILOX_M0;
    const uint32_t high1 = high_product(c2, PHILOX_M1), low1 = c2 * PHILOX_M1;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += PHILOX_W0;
    key1 += PHILOX_W1;
  }
  draws[0] = c0, draws[1] = c1, draws[2] = c2, draws[3] = c3;
}

struct Dropout {
  uint32_t threshold;  // a draw below it is dropped; 0: no dropout
  float scale;         // 1 / (1 - p)
  uint64_t seed;
};

static inline Dropout make_dropout(uint32_t threshold, uint64_t seed) {
  const float scale = threshold >= EVERY_DRAW ? 0.0f : (float)EVERY_DRAW / (float)(EVERY_DRAW - threshold);
  return {threshold, scale, seed};
}

// values[i] of columns 8 * group + i of `row`, times the mask's scale or 0.
PK_HOST_DEVICE void apply_mask(const Dropout& d, uint32_t group, uint32_t row, float (&values)[8]) {
  uint32_t draws[4];
  philox(d.seed, group, row, draws);
  PK_UNROLL
  for (int i = 0; i < 8; i++)
    values[i] *= (draws[i / 2] >> 16 * (i % 2) & 0xffff) >= d.threshold ? d.scale : 0.0f;
}

}  // namespace pk
