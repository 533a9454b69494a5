// The dropout mask: Philox4x32-10 (Salmon et al., 2011), eight 16-bit draws a counter, so that any part of a mask can be made again from its seed.
#pragma once
#include <stdint.h>

#include "simd.h"

namespace PK_NS {

struct Dropout {
  uint32_t threshold;  // a draw below it is dropped; 0: no dropout
  uint64_t seed;
  float scale;  // 1 / (1 - p)
};

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline Dropout make_dropout(uint32_t threshold, uint64_t seed) {
  return {threshold, seed, threshold >= 65536 ? 0.0f : 65536.0f / (float)(65536 - threshold)};
}

// Counters sit in the low halves of 64-bit lanes, where the widening multiply wants them; high halves may hold anything.
typedef uint64_t vq __attribute__((vector_size(VW * 4)));
constexpr int COUNTERS = VW / 2;
static inline vq widening_multiply(vq a, uint32_t b) {
#if defined(PK_AVX512)
  return (vq)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(PK_AVX2)
  return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * (uint64_t)b;
#endif
}

// The 8 * COUNTERS draws of counters (group ... group + COUNTERS - 1, row, 0, 0).
static inline void philox(uint64_t seed, uint32_t group, uint32_t row, uint16_t* draws) {
  vq c0, c1 = vq{} + row, c2 = vq{}, c3 = vq{};
  for (int i = 0; i < COUNTERS; i++) c0[i] = group + (uint32_t)i;
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    vq p0 = widening_multiply(c0, 0xD2511F53u), p1 = widening_multiply(c2, 0xCD9E8D57u);
    c0 = p1 >> 32 ^ c1 ^ (uint64_t)key0;
    c1 = p1;
    c2 = p0 >> 32 ^ c3 ^ (uint64_t)key1;
    c3 = p0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const vq first = (c0 & 0xffffffffu) | c1 << 32, second = (c2 & 0xffffffffu) | c3 << 32;
  for (int i = 0; i < COUNTERS; i++) {
    const uint64_t words[2] = {first[i], second[i]};
    memcpy(draws + 8 * i, words, sizeof words);
  }
}

// scale or 0 for elements (row, from ... from + count) -> out; `from` is a multiple of 8.
static void dropout_row(const Dropout& d, int64_t row, int64_t from, int64_t count, float* out) {
  constexpr int64_t BATCH = 8 * COUNTERS;
  for (int64_t base = 0; base < count; base += BATCH) {
    uint16_t draws[BATCH];
    float mask[BATCH];
    philox(d.seed, (uint32_t)((from + base) / 8), (uint32_t)row, draws);
    for (int j = 0; j < BATCH; j++) mask[j] = draws[j] >= d.threshold ? d.scale : 0.0f;
    memcpy(out + base, mask, (size_t)smaller(count - base, BATCH) * 4);
  }
}

// rows [rows][cols] of src at (row, from), times the mask -> dst [rows][ld_dst], fp32.
template <typename T>
static void apply_dropout(const Dropout& d, const T* src, int64_t ld, int64_t row, int64_t from, int64_t rows, int64_t cols, float* dst, int64_t ld_dst) {
  for (int64_t i = 0; i < rows; i++) {
    float* out = dst + i * ld_dst;
    dropout_row(d, row + i, from, cols, out);
    int64_t j = 0;
    for (; j + VW <= cols; j += VW) store(out + j, load(out + j) * loadx(src + i * ld + j));
    for (; j < cols; j++) out[j] *= to_float(src[i * ld + j]);
  }
}

}  // namespace PK_NS
