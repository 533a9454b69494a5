// Gradients of adapters in bf16 tiles: sums over rows of x (or dy), whose pairs of rows are B, against the
// fp32 dyb (or xa), which stands in A as the sum of bf16 numbers, each a row of its own.
#pragma once
#include "group.h"
#include "tile_pack.h"

namespace PK_NS {

constexpr int64_t GRADIENT_STEPS = pk::KC / SIDE, GRADIENT_BUFFER = 2 * GRADIENT_STEPS;

// Bf16 numbers that stand for an fp32 one: all of it where the gradient is more than bf16.
static inline int64_t sum_pieces(int dtype) { return dtype == PK_BF16 ? 2 : pk::PIECES; }
static inline int64_t slot_blocks(const pk_lora& lora) {
  return pk::panels_of(sum_pieces(lora.dtype) * lora.r);
}
// Steps of a chain: all there are where the gradient is rounded to bf16.
static inline int64_t gradient_chain(int dtype) { return dtype == PK_BF16 ? GRADIENT_STEPS : CHAIN_STEPS; }

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

// Rows that are summed over: 32 of them a step, `ld` apart, steps `step` apart; as they lie in a matrix, or
// in tiles. bits (may be null): which elements are kept, rows `ld_bits` bytes apart.
struct RowSource {
  const bf16* data;
  int64_t ld, step;
  const uint8_t* bits;
  int64_t ld_bits;
  // Those of 32 columns from `q` on, of which a step lies `panel` elements from the step of 32 columns
  // before.
  RowSource columns(int64_t q, int64_t panel) const {
    return {data + q / SIDE * panel, ld, step, bits ? bits + q / 8 : nullptr, ld_bits};
  }
};

// Pairs of rows [rows <= 32][cols <= 32] of step `s` -> a step of B.
static inline void pack_row_pairs(const RowSource& from, int64_t s, int64_t rows, int64_t cols, bf16* out) {
  const uint32_t some = first_words(cols);
  const bf16* src = from.data + s * from.step;
  const auto row = [&](int64_t i) {
    if (i >= rows) return _mm512_setzero_si512();
    uint32_t keep = ~0u;
    if (from.bits) memcpy(&keep, from.bits + (s * SIDE + i) * from.ld_bits, 4);
    return _mm512_maskz_loadu_epi16(some & keep, src + i * from.ld);
  };
  for (int64_t i = 0; i < SIDE; i += 2)
    interleave(row(i), row(i + 1), out + i * SIDE / 2, out + i * SIDE / 2 + HALF);
}

// What stands in A: blocks of 32 slots, `block` elements apart, of steps that follow each other.
struct Slots {
  const bf16* data;
  int64_t block, first, blocks;  // the first slot, a multiple of 32, and how many blocks from it on
};

// c [r][ld] += scale * low^T (rows [count][width]), count at most KC; b: room for GRADIENT_BUFFER steps. The
// next columns are packed while these are multiplied: a tile that was just stored can't be loaded before the
// store is done.
static void add_gradient(const Slots& slots, const pk_lora& lora, const RowSource& rows, int64_t panel,
                         int64_t count, int64_t width, float scale, bf16* b, float* c, int64_t ld) {
  const int64_t steps = pk::panels_of(count), chain = gradient_chain(lora.dtype);
  const int64_t all = sum_pieces(lora.dtype) * lora.r;
  bf16* next = b + GRADIENT_STEPS * STEP;
  alignas(64) float block[STEP];
  const auto pack = [&](int64_t q, int64_t s, bf16* out) {
    pack_row_pairs(rows.columns(q, panel), s, count - s * SIDE, width - q, out + s * STEP);
  };
  for (int64_t s = 0; s < steps; s++) pack(0, s, b);
  for (int64_t q = 0; q < width; q += SIDE) {
    for (int64_t i = 0; i < slots.blocks; i++)
      for (int64_t start = 0; start < steps; start += chain) {
        const int64_t first = slots.first + i * SIDE, done = smaller(chain, steps - start);
        const Segment part = {slots.data + i * slots.block + start * STEP, b + start * STEP, done};
        product_beside(part, block, smaller(SIDE, all - first), [&](int64_t s) {
          if (!i && q + SIDE < width) pack(q + SIDE, start + s, next);
        });
        for (int64_t j = 0; j < smaller(SIDE, all - first); j++) {
          float *to = c + (first + j) % lora.r * ld + q, *sum = block + j / 16 * 512 + j % 16 * 16;
          store(to, fma(set1(scale), load(sum), load(to)));
          store(to + VW, fma(set1(scale), load(sum + 256), load(to + VW)));
        }
      }
    std::swap(b, next);
  }
}

}  // namespace PK_NS
