// The dropout mask of philox.h in vectors, and as bits.
#pragma once
#include "../philox.h"
#include "simd.h"

namespace PK_NS {

using pk::Dropout;
using pk::make_dropout;
using pk::smaller;

// Counters sit in the low halves of 64-bit lanes, where the widening multiply wants them; high halves may
// hold anything.
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

// The rounds' keys and the threshold, a vector each, made once for many draws: from scalars they are a third
// of a draw's instructions.
typedef uint16_t vh __attribute__((vector_size(VW * 4)));
struct Draws {
  vq key0[pk::PHILOX_ROUNDS], key1[pk::PHILOX_ROUNDS];
  vh threshold;
};
static inline Draws make_draws(const Dropout& d) {
  Draws s;
  uint32_t key0 = (uint32_t)d.seed, key1 = (uint32_t)(d.seed >> 32);
  for (int round = 0; round < pk::PHILOX_ROUNDS; round++, key0 += pk::PHILOX_W0, key1 += pk::PHILOX_W1) {
    s.key0[round] = vq{} + (uint64_t)key0;
    s.key1[round] = vq{} + (uint64_t)key1;
  }
  s.threshold = vh{} + (uint16_t)smaller(d.threshold, pk::EVERY_DRAW - 1);  // at EVERY_DRAW the scale is 0
  return s;
}

// Two vectors of 16-bit comparisons -> a bit an element, 8 * COUNTERS of them. On AVX2 `even` holds the
// counters of even number, `odd` the others, which the pack brings into order; elsewhere they are the first
// and the second half.
static inline uint64_t mask_bits(vh even, vh odd) {
#if defined(PK_AVX512)
  return (uint64_t)_mm512_movepi16_mask((__m512i)even) | (uint64_t)_mm512_movepi16_mask((__m512i)odd) << 32;
#elif defined(PK_AVX2)
  return (uint32_t)_mm256_movemask_epi8(_mm256_packs_epi16((__m256i)even, (__m256i)odd));
#else
  uint64_t bits = 0, half[2];
  for (int i = 0; i < 2; i++) {
    const vh weight = {1, 2, 4, 8, 16, 32, 64, 128}, part = (i ? odd : even) & weight;
    memcpy(half, &part, sizeof half);
    half[0] |= half[1];
    half[0] |= half[0] >> 32;
    bits |= ((half[0] | half[0] >> 16) & 255) << 8 * i;
  }
  return bits;
#endif
}

// A draw is DRAW elements: two batches of counters on AVX2 and baseline, whose chains of ten dependent rounds
// run side by side.
constexpr int BATCH = 8 * COUNTERS, BATCHES = VW == 16 ? 1 : 2;
constexpr int64_t DRAW = BATCH * BATCHES;

// A counter's halves side by side, in the order in which `mask_bits` wants the counters.
template <int HALF>
constexpr int draw_order(int i) {
  return (VW == 8 ? i / 2 * 2 + HALF : HALF * COUNTERS / 2 + i / 2) + (i & 1) * COUNTERS;
}

// Bit i: element 8 * group + i of the row is kept.
static inline __attribute__((always_inline)) uint64_t draw(const Draws& d, uint32_t group, uint32_t row) {
  vq c0[BATCHES], c1[BATCHES], c2[BATCHES], c3[BATCHES];
  for (int b = 0; b < BATCHES; b++) {
    for (int i = 0; i < COUNTERS; i++) c0[b][i] = (uint64_t)i;
    c0[b] += (uint64_t)(uint32_t)(group + b * COUNTERS);
    c1[b] = vq{} + (uint64_t)row;
    c2[b] = c3[b] = vq{};
  }
#pragma GCC unroll 10
  for (int round = 0; round < pk::PHILOX_ROUNDS; round++)
    for (int b = 0; b < BATCHES; b++) {
      const vq p0 = widening_multiply(c0[b], pk::PHILOX_M0), p1 = widening_multiply(c2[b], pk::PHILOX_M1);
      c0[b] = p1 >> 32 ^ (c1[b] ^ d.key0[round]);
      c1[b] = p1;
      c2[b] = p0 >> 32 ^ (c3[b] ^ d.key1[round]);
      c3[b] = p0;
    }
  uint64_t bits = 0;
  for (int b = 0; b < BATCHES; b++) {
    // A counter's two halves.
    const vq first = (c0[b] & 0xffffffffu) | c1[b] << 32, second = (c2[b] & 0xffffffffu) | c3[b] << 32;
    vh keep[2];
    keep[0] = (vh)((vh)shuffle<draw_order<0>>(first, second) >= d.threshold);
    keep[1] = (vh)((vh)shuffle<draw_order<1>>(first, second) >= d.threshold);
    bits |= mask_bits(keep[0], keep[1]) << b * (BATCH % 64);
  }
  return bits;
}

// scale or 0 for LANES elements, from their bits.
static inline __attribute__((always_inline)) void factors(uint32_t bits, vf scale, vf* out) {
  vi lane;
  for (int i = 0; i < VW; i++) lane[i] = 1 << i;
  for (int half = 0; half < 2; half++) {
    const vi set = (vi{} + (int32_t)(bits >> half * VW)) & lane;
    out[half] = (vf)((vi)(set == lane) & (vi)scale);
  }
}

// scale or 0 for elements (row, from ... from + count) -> out; `from` is a multiple of 8.
static void dropout_row(const Dropout& d, int64_t row, int64_t from, int64_t count, float* out) {
  const Draws draws = make_draws(d);
  const vf scale = set1(d.scale);
  for (int64_t base = 0; base < count; base += DRAW) {
    const uint64_t bits = draw(draws, (uint32_t)((from + base) / 8), (uint32_t)row);
    vf factor[DRAW / VW];
    for (int q = 0; q < DRAW / LANES; q++) factors((uint32_t)(bits >> q * LANES), scale, factor + 2 * q);
    memcpy(out + base, factor, (size_t)smaller(count - base, DRAW) * 4);
  }
}

// rows [rows][cols] of src at (row, from), times the mask -> dst [rows][ld_dst], fp32.
template <typename T>
static void apply_dropout(const Dropout& d, const T* src, int64_t ld, int64_t row, int64_t from, int64_t rows,
                          int64_t cols, float* dst, int64_t ld_dst) {
  for (int64_t i = 0; i < rows; i++) {
    const T* in = src + i * ld;
    float* out = dst + i * ld_dst;
    dropout_row(d, row + i, from, cols, out);
    int64_t j = 0;
    for (; j + VW <= cols; j += VW) store(out + j, load(out + j) * loadx(in + j));
    for (; j < cols; j++) out[j] *= to_float(in[j]);
  }
}

// The bits of elements (row ... row + rows, from ... from + cols), in whole draws: rows of `ld` bytes, at
// least cols rounded up to DRAW.
static void draw_bits(const Dropout& d, int64_t row, int64_t from, int64_t rows, int64_t cols, uint8_t* bits,
                      int64_t ld) {
  const Draws draws = make_draws(d);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < cols; j += DRAW) {
      const uint64_t word = draw(draws, (uint32_t)((from + j) / 8), (uint32_t)(row + i));
      memcpy(bits + i * ld + j / 8, &word, DRAW / 8);
    }
}

// dst [cols][ld_dst] = (or, ADD, +=) the mask times src [cols][LANES], a packed panel whose lanes [from, to)
// are `bits`' rows; no other lane is kept.
template <bool ADD>
static void mask_panel(const uint8_t* bits, int64_t ld, int64_t from, int64_t to, float scale, int64_t cols,
                       const float* src, float* dst, int64_t ld_dst) {
  for (int64_t j0 = 0; j0 < cols; j0 += 8) {
    int32_t words[LANES] = {};
    for (int64_t l = from; l < to; l++) words[l] = bits[(l - from) * ld + j0 / 8];
    const vu word[2] = {(vu)loadi(words), (vu)loadi(words + VW)};
    const int64_t count = smaller(8, cols - j0);
#pragma GCC unroll 8
    for (int64_t j = 0; j < 8; j++) {
      if (j == count) break;
      for (int half = 0; half < 2; half++) {
        const vf factor = (vf)(((vi)(word[half] << (31 - (int)j)) >> 31) & (vi)set1(scale));
        const vf v = factor * load(src + (j0 + j) * LANES + half * VW);
        float* at = dst + (j0 + j) * ld_dst + half * VW;
        store(at, ADD ? load(at) + v : v);
      }
    }
  }
}

// dst [rows][LANES] = the mask times src [rows][cols <= LANES], padded with zeros.
template <typename T>
static void pack_masked_rows(const uint8_t* bits, int64_t ld_bits, float scale, const T* src, int64_t ld,
                             int64_t rows, int64_t cols, float* dst) {
  for (int64_t i = 0; i < rows; i++, src += ld, bits += ld_bits, dst += LANES) {
    uint32_t word = 0;
    memcpy(&word, bits, LANES / 8);
    vf factor[2];
    factors(word, set1(scale), factor);
    if (cols >= LANES) {
      store(dst, factor[0] * loadx(src));
      store(dst + VW, factor[1] * loadx(src + VW));
      continue;
    }
    float each[LANES];
    memcpy(each, factor, sizeof each);
    for (int64_t j = 0; j < LANES; j++) dst[j] = j < cols ? each[j] * to_float(src[j]) : 0.0f;
  }
}

}  // namespace PK_NS
