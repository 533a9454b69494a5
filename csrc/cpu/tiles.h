// A block of a bf16 product: C [32][32] fp32 += A [32][32 s] B [32 s][32], by AMX's tiles or by vdpbf16ps.
// Either takes products of bf16 numbers exactly, sums in fp32, and takes numbers below 2^-126 as zero.
#pragma once
#include "tile_plan.h"
#include "simd.h"

namespace PK_NS {

using pk::SIDE;
using pk::STEP;
constexpr int64_t HALF = STEP / 2;  // a tile's bf16 elements: 16 rows of 64 bytes

static inline __m512i load_words(const void* p) { return _mm512_loadu_si512(p); }
static inline void store_words(void* p, __m512i v) { _mm512_storeu_si512(p, v); }
static inline uint32_t first_words(int64_t count) {
  return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1;
}

// a, b -> 32 bf16 numbers, those of a first; to nearest even, below 2^-126 to zero.
static inline __m512i round_both(vf a, vf b) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }

// A step of A is two tiles of 16 rows with 32 columns. A step of B is two tiles of 16 columns, each as 16
// pairs of contraction steps [16 pairs][16 columns][2]. C is four tiles [2 halves of rows][2 of
// columns][16][16].
struct Segment {
  const bf16 *a, *b;
  int64_t steps;
};

// Of a block: row i's first 16 columns; the others lie 256 further on.
template <typename F>
static inline F* row_of_block(F* block, int64_t i) {
  return block + i / 16 * 512 + i % 16 * 16;
}

// Where a block goes when it is summed: `cols` <= 32 columns of bf16 rows `ld` apart, a bias's added.
struct Target {
  bf16* out;
  int64_t ld, cols;
  vf low, high;  // of the bias
  void put(int64_t row, vf first, vf second) const {
    const __m512i both = round_both(first + low, second + high);
    if (cols >= SIDE) store_words(out + row * ld, both);
    else _mm512_mask_storeu_epi16(out + row * ld, first_words(cols), both);
  }
  void put_block(const float* c, int64_t rows) const {
    for (int64_t i = 0; i < rows; i++) {
      const float* at = row_of_block(c, i);
      put(i, load(at), load(at + 256));
    }
  }
};

// Steps of a chain in the low-rank products. A tile sums 32 terms of a step in one go.
#if defined(PK_AMX)
constexpr int64_t CHAIN_STEPS = pk::PROJECT_STEPS;
#else
constexpr int64_t CHAIN_STEPS = 1;
#endif

// On either level:
//   tile_product   c = (or, `accumulate`, +=) the segments' products; of c's rows the first `rows` are
//                  wanted. With a target they go there, and c is anything
//   product_beside c = one product, with `other(step)` called once a step, beside it where that is faster
//   add_chains     sums += a times each of the pieces of a factor [steps], summed in chains of CHAIN_STEPS
//                  steps, in the order of b; of sums' columns the first `columns` are wanted

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
static inline void add_step(const bf16* a, const bf16* b) {
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

static void tile_product(const Segment* segments, int64_t count, float* c, bool accumulate,
                         int64_t rows = SIDE, const Target* target = nullptr) {
  begin_block(c, accumulate);
  for (int64_t q = 0; q < count; q++) {
    const bf16 *a = segments[q].a, *b = segments[q].b;
    for (const bf16* end = a + segments[q].steps * STEP; a < end; a += STEP, b += STEP) add_step(a, b);
  }
  end_block(c);
  if (target) target->put_block(c, rows);
}

template <typename F>
static inline void product_beside(const Segment& part, float* c, int64_t, F other) {
  begin_block(c, false);
  for (int64_t s = 0; s < part.steps; s++) {
    add_step(part.a + s * STEP, part.b + s * STEP);
    other(s);
  }
  end_block(c);
}

static void add_chains(const bf16* a, const bf16* const* b, int64_t pieces, int64_t steps, int64_t,
                       float* sums) {
  alignas(64) float chain[STEP];
  for (int64_t step = 0; step < steps; step += CHAIN_STEPS) {
    Segment parts[pk::PIECES];
    for (int64_t i = 0; i < pieces; i++)
      parts[i] = {a + step * STEP, b[i] + step * STEP, pk::smaller(CHAIN_STEPS, steps - step)};
    tile_product(parts, pieces, chain, false);
    for (int64_t i = 0; i < STEP; i += VW) store(sums + i, load(sums + i) + load(chain + i));
  }
}

#else

static inline void tiles_on() {}
static inline void tiles_off() {}

static inline vf dot_pairs(vf sum, __m512i a, __m512i b) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

static inline __m512i both_of(const bf16* pair) {
  int32_t two;
  memcpy(&two, pair, sizeof two);
  return _mm512_set1_epi32(two);
}

// Rows [row, row + ROWS) of a block: 16 sums, so that their latency is covered. Unrolled, they never leave
// the registers before they go to c, or to the target.
template <int ROWS>
static void rows_product(const Segment* segments, int64_t count, int64_t row, float* c, bool accumulate,
                         int64_t rows, const Target* target) {
  float* out = row_of_block(c, row);
  vf sums[ROWS][2];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    sums[r][0] = accumulate ? load(out + r * 16) : vf{};
    sums[r][1] = accumulate ? load(out + 256 + r * 16) : vf{};
  }
  for (int64_t q = 0; q < count; q++) {
    const bf16 *a = segments[q].a + row * SIDE, *b = segments[q].b;
    for (const bf16* end = a + segments[q].steps * STEP; a < end; a += STEP, b += STEP)
      for (int pair = 0; pair < 16; pair++) {
        const __m512i b0 = _mm512_loadu_si512(b + pair * 32), b1 = _mm512_loadu_si512(b + HALF + pair * 32);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          const __m512i both = both_of(a + r * SIDE + 2 * pair);
          sums[r][0] = dot_pairs(sums[r][0], both, b0);
          sums[r][1] = dot_pairs(sums[r][1], both, b1);
        }
      }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    if (target) {
      if (row + r < rows) target->put(row + r, sums[r][0], sums[r][1]);
      continue;
    }
    store(out + r * 16, sums[r][0]);
    store(out + 256 + r * 16, sums[r][1]);
  }
}

static void tile_product(const Segment* segments, int64_t count, float* c, bool accumulate,
                         int64_t rows = SIDE, const Target* target = nullptr) {
  for (int64_t row = 0; row < rows; row += 8)
    rows_product<8>(segments, count, row, c, accumulate, rows, target);
}

template <typename F>
static inline void product_beside(const Segment& part, float* c, int64_t rows, F other) {
  for (int64_t s = 0; s < part.steps; s++) other(s);
  tile_product(&part, 1, c, false, rows);
}

// Rows [row, row + 8) of 16 columns. A chain is every other pair of a step, so that 16 sums are under way.
static void add_eight_chains(const bf16* a, const bf16* const* b, int64_t pieces, int64_t steps,
                             float* sums) {
  vf totals[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; r++) totals[r] = load(sums + r * 16);
  for (int64_t s = 0; s < steps; s++) {
    vf chains[8][2] = {};
    for (int64_t i = 0; i < pieces; i++)
      for (int pair = 0; pair < 16; pair += 2) {
        const bf16 *at = b[i] + s * STEP + pair * 32, *of = a + s * STEP + 2 * pair;
        const __m512i b0 = _mm512_loadu_si512(at), b1 = _mm512_loadu_si512(at + 32);
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
          chains[r][0] = dot_pairs(chains[r][0], both_of(of + r * SIDE), b0);
          chains[r][1] = dot_pairs(chains[r][1], both_of(of + r * SIDE + 2), b1);
        }
      }
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) totals[r] += chains[r][0] + chains[r][1];
  }
#pragma GCC unroll 8
  for (int r = 0; r < 8; r++) store(sums + r * 16, totals[r]);
}

static void add_chains(const bf16* a, const bf16* const* b, int64_t pieces, int64_t steps, int64_t columns,
                       float* sums) {
  for (int64_t half = 0; half < (columns > 16 ? 2 : 1); half++) {
    const bf16* of_half[pk::PIECES];
    for (int64_t i = 0; i < pieces; i++) of_half[i] = b[i] + half * HALF;
    for (int64_t row = 0; row < SIDE; row += 8)
      add_eight_chains(a + row * SIDE, of_half, pieces, steps, row_of_block(sums, row) + half * 256);
  }
}

#endif

}  // namespace PK_NS
