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

// A batch is what VW / 2 counters draw: 8 elements a counter, four vectors of factors.
constexpr int64_t BATCH = 8 * COUNTERS;
typedef uint16_t vh __attribute__((vector_size(VW * 4)));
typedef int16_t vmask __attribute__((vector_size(VW * 2)));

// The factors, scale or 0, of elements 8 * group ... 8 * group + BATCH - 1 of a row. All stays in registers: through memory it took twice the time.
static inline __attribute__((always_inline)) void dropout_batch(const Dropout& d, uint32_t group, uint32_t row, vf* factor) {
  vq c0, c1 = vq{} + row, c2 = vq{}, c3 = vq{};
  for (int i = 0; i < COUNTERS; i++) c0[i] = group + (uint32_t)i;
  uint32_t key0 = (uint32_t)d.seed, key1 = (uint32_t)(d.seed >> 32);
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
  const uint16_t threshold = (uint16_t)(d.threshold < 65536 ? d.threshold : 65535);  // at 65536 the scale is 0
  const vi scale = (vi)set1(d.scale);
  for (int half = 0; half < 2; half++) {
    vq order;  // a counter's two halves side by side
    for (int i = 0; i < COUNTERS; i++) order[i] = (uint64_t)(half * COUNTERS / 2 + i / 2 + (i & 1) * COUNTERS);
    const auto keep = (vh)__builtin_shuffle(first, second, order) >= threshold;
    vmask part[2];
    memcpy(part, &keep, sizeof part);
    for (int i = 0; i < 2; i++) factor[2 * half + i] = (vf)(__builtin_convertvector(part[i], vi) & scale);
  }
}

// scale or 0 for elements (row, from ... from + count) -> out; `from` is a multiple of 8.
static void dropout_row(const Dropout& d, int64_t row, int64_t from, int64_t count, float* out) {
  for (int64_t base = 0; base < count; base += BATCH) {
    vf factor[4];
    dropout_batch(d, (uint32_t)((from + base) / 8), (uint32_t)row, factor);
    memcpy(out + base, factor, (size_t)smaller(count - base, BATCH) * 4);
  }
}

// rows [rows][cols] of src at (row, from), times the mask -> dst [rows][ld_dst], fp32.
template <typename T>
static void apply_dropout(const Dropout& d, const T* src, int64_t ld, int64_t row, int64_t from, int64_t rows, int64_t cols, float* dst, int64_t ld_dst) {
  for (int64_t i = 0; i < rows; i++) {
    const T* in = src + i * ld;
    float* out = dst + i * ld_dst;
    int64_t base = 0;
    for (; base + BATCH <= cols; base += BATCH) {
      vf factor[4];
      dropout_batch(d, (uint32_t)((from + base) / 8), (uint32_t)(row + i), factor);
      for (int j = 0; j < 4; j++) store(out + base + j * VW, factor[j] * loadx(in + base + j * VW));
    }
    dropout_row(d, row + i, from + base, cols - base, out + base);
    for (; base < cols; base++) out[base] *= to_float(in[base]);
  }
}

}  // namespace PK_NS
