// A block of a bf16 product: C [32][32] fp32 += A [32][32 s] B [32 s][32], by AMX's tiles or by vdpbf16ps.
// Either takes products of bf16 numbers exactly, sums in fp32, and takes numbers below 2^-126 as zero.
#pragma once
#include "tile_plan.h"
#include "simd.h"

namespace PK_NS {

using pk::SIDE;
using pk::STEP;
constexpr int64_t HALF = STEP / 2;  // a tile's bf16 elements: 16 rows of 64 bytes

// A step of A is two tiles of 16 rows with 32 columns. A step of B is two tiles of 16 columns, each as 16
// pairs of contraction steps [16 pairs][16 columns][2]. C is four tiles [2 halves of rows][2 of
// columns][16][16].
struct Segment {
  const bf16 *a, *b;
  int64_t steps;
};

// Steps of a chain in the low-rank products. A tile sums 32 terms of a step in one go.
#if defined(PK_AMX)
constexpr int64_t CHAIN_STEPS = pk::PROJECT_STEPS;
#else
constexpr int64_t CHAIN_STEPS = 1;
#endif

#if defined(PK_AMX)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A thread's tiles are set up where it begins to multiply and given back behind it: a thread with live tiles
// costs the system 8 KB at each switch, and other libraries set them up as they need.
static inline void tiles_on() {
  static const TileConfig config;
  _tile_loadconfig(&config);
}
static inline void tiles_off() { _tile_release(); }

// The compiler does not see what tile instructions read.
static inline void memory_barrier() { __asm__ volatile("" ::: "memory"); }

// A block of C by steps: begun from zero or from c, a product a step, put down in c.
static inline void begin_block(const float* c, bool accumulate) {
  constexpr int64_t ROW = 64;
  memory_barrier();
  if (accumulate) {
    _tile_loadd(0, c, ROW);
    _tile_loadd(1, c + 256, ROW);
    _tile_loadd(2, c + 512, ROW);
    _tile_loadd(3, c + 768, ROW);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
}
static inline void add_step(const bf16* a, const bf16* b, float*) {
  constexpr int64_t ROW = 64;
  memory_barrier();
  _tile_loadd(4, a, ROW);
  _tile_loadd(6, b, ROW);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, b + HALF, ROW);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, a + HALF, ROW);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}
static inline void end_block(float* c) {
  constexpr int64_t ROW = 64;
  _tile_stored(0, c, ROW);
  _tile_stored(1, c + 256, ROW);
  _tile_stored(2, c + 512, ROW);
  _tile_stored(3, c + 768, ROW);
  memory_barrier();
}

static void tile_product(const Segment* segments, int64_t count, float* c, bool accumulate) {
  begin_block(c, accumulate);
  for (int64_t q = 0; q < count; q++) {
    const bf16 *a = segments[q].a, *b = segments[q].b;
    for (const bf16* end = a + segments[q].steps * STEP; a < end; a += STEP, b += STEP) add_step(a, b, c);
  }
  end_block(c);
}

#else

static inline void tiles_on() {}
static inline void tiles_off() {}

static inline vf dot_pairs(vf sum, __m512i a, __m512i b) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// Rows [row, row + ROWS) of a block, all of one half: 16 sums, so that their latency is covered.
template <int ROWS>
static void rows_product(const Segment* segments, int64_t count, int64_t row, float* c, bool accumulate) {
  const int64_t half = row / 16, at = half * HALF + row % 16 * SIDE;
  float* out[2] = {c + half * 512 + row % 16 * 16, c + half * 512 + 256 + row % 16 * 16};
  vf sums[ROWS][2] = {};
  for (int r = 0; accumulate && r < ROWS; r++)
    for (int h = 0; h < 2; h++) sums[r][h] = load(out[h] + r * 16);
  for (int64_t q = 0; q < count; q++) {
    const bf16 *a = segments[q].a + at, *b = segments[q].b;
    for (const bf16* end = a + segments[q].steps * STEP; a < end; a += STEP, b += STEP)
      for (int pair = 0; pair < 16; pair++) {
        const __m512i b0 = _mm512_loadu_si512(b + pair * 32), b1 = _mm512_loadu_si512(b + HALF + pair * 32);
        for (int r = 0; r < ROWS; r++) {
          int32_t two;
          memcpy(&two, a + r * SIDE + 2 * pair, sizeof two);
          const __m512i both = _mm512_set1_epi32(two);
          sums[r][0] = dot_pairs(sums[r][0], both, b0);
          sums[r][1] = dot_pairs(sums[r][1], both, b1);
        }
      }
  }
  for (int r = 0; r < ROWS; r++)
    for (int h = 0; h < 2; h++) store(out[h] + r * 16, sums[r][h]);
}

static void tile_product(const Segment* segments, int64_t count, float* c, bool accumulate) {
  for (int64_t row = 0; row < SIDE; row += 8) rows_product<8>(segments, count, row, c, accumulate);
}

static inline void begin_block(float* c, bool accumulate) {
  if (!accumulate) memset(c, 0, STEP * sizeof(float));
}
static inline void add_step(const bf16* a, const bf16* b, float* c) {
  const Segment part = {a, b, 1};
  tile_product(&part, 1, c, true);
}
static inline void end_block(float*) {}

#endif

}  // namespace PK_NS
