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

static inline Dropout make_dropout(uint32_t threshold, uint64_t seed) {
  return {threshold, seed, threshold >= 65536 ? 0.0f : 65536.0f / (float)(65536 - threshold)};
}

// scale or 0 for elements (row, from ... from + count) -> out; `from` is a multiple of 8.
static void dropout_row(const Dropout& d, int64_t row, int64_t from, int64_t count, float* out) {
  constexpr int BATCH = 16;  // counters at once: enough independent work for every vector width
  for (int64_t base = 0; base < count; base += 8 * BATCH) {
    uint32_t c0[BATCH], c1[BATCH], c2[BATCH] = {}, c3[BATCH] = {};
    for (int i = 0; i < BATCH; i++) {
      c0[i] = (uint32_t)((from + base) / 8 + i);
      c1[i] = (uint32_t)row;
    }
    uint32_t key0 = (uint32_t)d.seed, key1 = (uint32_t)(d.seed >> 32);
    for (int round = 0; round < 10; round++) {
      for (int i = 0; i < BATCH; i++) {
        uint64_t p0 = (uint64_t)c0[i] * 0xD2511F53u, p1 = (uint64_t)c2[i] * 0xCD9E8D57u;
        c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ key0;
        c1[i] = (uint32_t)p1;
        c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ key1;
        c3[i] = (uint32_t)p0;
      }
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    float mask[8 * BATCH];
    for (int i = 0; i < BATCH; i++) {
      const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
      for (int j = 0; j < 4; j++) {
        mask[8 * i + 2 * j] = (words[j] & 0xffff) >= d.threshold ? d.scale : 0.0f;
        mask[8 * i + 2 * j + 1] = (words[j] >> 16) >= d.threshold ? d.scale : 0.0f;
      }
    }
    int64_t size = count - base < 8 * BATCH ? count - base : 8 * BATCH;
    memcpy(out + base, mask, (size_t)size * 4);
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
