// Gradients of adapters in bf16 tiles: sums over rows of x (or dy), whose pairs of rows are B, against the
// fp32 dyb (or xa), which stands in A as the sum of bf16 numbers, each a row of its own.
#pragma once
#include "group.h"
#include "tile_pack.h"

namespace PK_NS {

constexpr int64_t GRADIENT_STEPS = pk::KC / SIDE;

// Bf16 numbers that stand for an fp32 one: all of it where the gradient is more than bf16.
static inline int64_t sum_pieces(int dtype) { return dtype == PK_BF16 ? 2 : 3; }

// Rows of A, `slot` = piece * r + rank, from `first` on for 32 of them: low [rows][r] by columns -> steps of
// A.
static void pack_slots(const float* low, int64_t rows, int64_t r, int64_t pieces, int64_t first, bf16* out) {
  const int64_t steps = pk::panels_of(rows);
  for (int64_t s = 0; s < steps; s++) {
    bf16* step = out + s * STEP;
    for (int64_t i = pieces * r - first; i < SIDE; i++)
      if (i >= 0) store_words(step + i * SIDE, _mm512_setzero_si512());
    for (int64_t j0 = 0; j0 < r; j0 += VW) {
      vf values[2][VW];
      for (int half = 0; half < 2; half++) {
        for (int i = 0; i < VW; i++) {
          const int64_t row = s * SIDE + half * VW + i;
          values[half][i] = vf{};
          if (row < rows)
            values[half][i] =
                (vf)_mm512_maskz_loadu_epi32((uint16_t)first_words(smaller(r - j0, VW)), low + row * r + j0);
        }
        transpose(values[half]);
      }
      for (int64_t j = 0; j < smaller(VW, r - j0); j++)
        for (int64_t piece = 0; piece < pieces; piece++) {
          const int64_t slot = piece * r + j0 + j - first;
          if (slot >= 0 && slot < SIDE)
            store_words(step + slot * SIDE, round_both(values[0][j], values[1][j]));
          values[0][j] -= rounded_value(values[0][j]), values[1][j] -= rounded_value(values[1][j]);
        }
    }
  }
}

// Pairs of rows [rows][cols <= 32] -> steps of B; bits (may be null): which elements are kept, rows `ld_bits`
// bytes apart.
static void pack_row_pairs(const bf16* src, int64_t ld, int64_t rows, int64_t cols, const uint8_t* bits,
                           int64_t ld_bits, bf16* out) {
  const uint32_t some = first_words(cols);
  const auto row = [&](int64_t i) {
    if (i >= rows) return _mm512_setzero_si512();
    uint32_t keep = ~0u;
    if (bits) memcpy(&keep, bits + i * ld_bits, 4);
    return _mm512_maskz_loadu_epi16(some & keep, src + i * ld);
  };
  for (int64_t i = 0; i < pk::round_up(rows, SIDE); i += 2) {
    bf16* to = out + i / SIDE * STEP + i % SIDE / 2 * 32;
    interleave(row(i), row(i + 1), to, to + HALF);
  }
}

// c [r][ld] += scale * low^T (rows [rows][width]), rows at most KC; a, b: room for GRADIENT_STEPS steps each.
static void add_gradient(const float* low, int64_t r, int64_t pieces, const bf16* rows, int64_t ld_rows,
                         int64_t count, int64_t width, const uint8_t* bits, int64_t ld_bits, float scale,
                         bf16* a, bf16* b, float* c, int64_t ld) {
  const int64_t steps = pk::panels_of(count);
  alignas(64) float block[STEP];
  for (int64_t first = 0; first < pieces * r; first += SIDE) {
    pack_slots(low, count, r, pieces, first, a);
    for (int64_t q = 0; q < width; q += SIDE) {
      pack_row_pairs(rows + q, ld_rows, count, width - q, bits ? bits + q / 8 : nullptr, ld_bits, b);
      for (int64_t step = 0; step < steps; step += CHAIN_STEPS) {
        const Segment part = {a + step * STEP, b + step * STEP, smaller(CHAIN_STEPS, steps - step)};
        tile_product(&part, 1, block, false);
        for (int64_t i = 0; i < smaller(SIDE, pieces * r - first); i++) {
          float *to = c + (first + i) % r * ld + q, *from = block + i / 16 * 512 + i % 16 * 16;
          store(to, fma(set1(scale), load(from), load(to)));
          store(to + VW, fma(set1(scale), load(from + 256), load(to + VW)));
        }
      }
    }
  }
}

}  // namespace PK_NS
