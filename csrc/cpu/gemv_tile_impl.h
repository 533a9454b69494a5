// The fused linear for few rows in AMX's tiles: 16 rows of W are A as they lie, decoded into the first-level
// cache with nothing turned, and up to 64 rows of x are columns of B, packed once.
#pragma once
#include "gemv_impl.h"
#include "tile_pack.h"

namespace PK_NS {

constexpr int64_t LEAST_TILE_ROWS = 3;  // of x, from which on this beats codes looked up for each row of x
constexpr int64_t MOST_TILE_ROWS = 64;

static inline bool gemv_tiles_take(const pk_weight& w, int64_t m) {
  return m >= LEAST_TILE_ROWS && m <= MOST_TILE_ROWS && w.code && w.blocksize >= 64 && w.k % 64 == 0;
}

// What the tasks share: tiles of 16 columns [columns][steps], and xa times the scaling [columns][r][16].
struct TileRows {
  const pk_weight& w;
  int64_t m, r;
  const bf16* x;
  const float *low, *lora_b, *bias;  // bias may be null
  int64_t steps() const { return w.k / SIDE; }
  const bf16* tiles(int64_t column) const { return x + column * steps() * HALF; }
};

// Columns [16 c, 16 c + 16) of step `step` of B.
static inline void pack_few(const bf16* x, int64_t m, int64_t k, int64_t c, int64_t step, bf16* out) {
  const int64_t rows = smaller(16, m - 16 * c);
  const bf16* src = x + 16 * c * k + step * SIDE;
  if (rows == 16) return transpose_pairs(src, k, out);
  alignas(64) bf16 some[16 * SIDE] = {};
  for (int64_t i = 0; i < rows; i++) store_words(some + i * SIDE, load_words(src + i * k));
  transpose_pairs(some, SIDE, out);
}

// Steps decoded at a time: 8 KB, and as much again that is being multiplied. 16 took a third longer.
constexpr int64_t FEW_STEPS = 8;

// `steps` (even) steps of a row of W -> its line of their tiles. packed: their codes; scales: of 64 columns
// each.
static inline void decode_line(vf codes, const uint8_t* packed, const float* scales, int64_t steps,
                               bf16* out) {
  for (int64_t s = 0; s < steps; s += 2, packed += SIDE, out += 2 * HALF) {
    __builtin_prefetch(packed + FEW_STEPS * SIDE / 2);
    const vf scaled = codes * set1(*scales++);
    const __m512i table = round_both(scaled, scaled);
    store_words(out, _mm512_permutexvar_epi16(word_codes(packed), table));
    store_words(out + HALF, _mm512_permutexvar_epi16(word_codes(packed + 16), table));
  }
}

constexpr int64_t FEW_SCALES = 64;  // of 64 columns each, held for a row at a time

// The scales of `steps` steps of rows [row, row + rows) of W, from step `step` on -> out, rows `ld` apart.
// Those of whole rows lie together.
static void line_scales(const pk_weight& w, int64_t row, int64_t rows, int64_t step, int64_t steps,
                        int64_t ld, float* out) {
  const int shift = __builtin_ctz((unsigned)w.blocksize);
  const int64_t count = steps / 2, start = row * w.k + step * SIDE;
  if (w.blocksize == 64 && ld == w.k / 64) return wide_scales(w, start >> shift, rows * count, out);
  for (int64_t i = 0; i < rows; i++, out += ld) {
    const int64_t first = start + i * w.k;
    if (w.blocksize == 64) wide_scales(w, first >> shift, count, out);
    for (int64_t j = 0; w.blocksize != 64 && j < count; j++)
      out[j] = pk::absmax_of(w, (first + 64 * j) >> shift);
  }
}

// One step of 16 rows of W against COLUMNS tiles of B, `ld` elements apart. With few of them two sums take
// turns.
template <int COLUMNS>
static inline __attribute__((always_inline)) void few_step(const bf16* a, const bf16* b, int64_t ld,
                                                           bool odd) {
  constexpr int64_t ROW = 64;
  memory_barrier();
  _tile_loadd(4, a, ROW);
  _tile_loadd(5, b, ROW);
  if (COLUMNS <= 2 && odd) _tile_dpbf16ps(2, 4, 5);
  else _tile_dpbf16ps(0, 4, 5);
  if constexpr (COLUMNS > 1) {
    _tile_loadd(6, b + ld, ROW);
    if (COLUMNS <= 2 && odd) _tile_dpbf16ps(3, 4, 6);
    else _tile_dpbf16ps(1, 4, 6);
  }
  if constexpr (COLUMNS > 2) {
    _tile_loadd(7, b + 2 * ld, ROW);
    _tile_dpbf16ps(2, 4, 7);
  }
  if constexpr (COLUMNS > 3) {
    _tile_loadd(5, b + 3 * ld, ROW);
    _tile_dpbf16ps(3, 4, 5);
  }
}

// c [COLUMNS][16 rows of W][16 of x] = rows [n0, n0 + rows) of W times x.
template <int COLUMNS>
static void few_products(const TileRows& f, int64_t n0, int64_t rows, float (*c)[256]) {
  alignas(64) bf16 decoded[2][FEW_STEPS * HALF];
  float scales[16 * (FEW_SCALES + VW)];
  if (rows < 16) memset(decoded, 0, sizeof decoded);
  const vf codes = load(f.w.code);
  const uint8_t* packed = (const uint8_t*)f.w.data;
  const int64_t all = f.steps(), ld = all * HALF;
  const int64_t ld_scales = all / 2 <= FEW_SCALES ? all / 2 : FEW_SCALES + VW;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0, before = 0, half = 0; step < all || before; half ^= 1) {
    const int64_t steps = smaller(FEW_STEPS, all - step), known = step % (2 * FEW_SCALES);
    const bf16 *a = decoded[half ^ 1], *b = f.x + (step - before) * HALF;
    if (steps && !known)
      line_scales(f.w, n0, rows, step, smaller(2 * FEW_SCALES, all - step), ld_scales, scales);
    for (int64_t i = 0; i < 16; i++) {
      const int64_t start = (n0 + i) * f.w.k + step * SIDE;
      if (i < rows && steps)
        decode_line(codes, packed + start / 2, scales + i * ld_scales + known / 2, steps,
                    decoded[half] + i * SIDE);
      if (i % 2 && i / 2 < before) few_step<COLUMNS>(a + i / 2 * HALF, b + i / 2 * HALF, ld, i / 2 & 1);
    }
    step += steps, before = steps;
  }
  constexpr int64_t ROW = 64;
  alignas(64) float sums[4][256];
  _tile_stored(0, sums[0], ROW);
  _tile_stored(1, sums[1], ROW);
  _tile_stored(2, sums[2], ROW);
  _tile_stored(3, sums[3], ROW);
  memory_barrier();
  for (int64_t q = 0; q < COLUMNS; q++)
    for (int64_t i = 0; i < 256; i += VW)
      store(c[q] + i, COLUMNS <= 2 ? load(sums[q] + i) + load(sums[q + 2] + i) : load(sums[q] + i));
}

// The low-rank part and the bias added to c, and 16 columns of y of rows [16 q, ...) stored.
static void few_store(const TileRows& f, int64_t n0, int64_t rows, int64_t q, const float* c, bf16* y) {
  vf sums[16];
  const float* low = f.low + q * f.r * 16;
  for (int64_t i = 0; i < 16; i++) {
    sums[i] = load(c + i * 16) + set1(f.bias && i < rows ? f.bias[n0 + i] : 0.0f);
    for (int64_t j = 0; i < rows && j < f.r; j++)
      sums[i] = fma(set1(f.lora_b[(n0 + i) * f.r + j]), load(low + j * 16), sums[i]);
  }
  transpose(sums);
  for (int64_t i = 0; i < smaller(16, f.m - 16 * q); i++) {
    bf16 line[VW], *out = y + (16 * q + i) * f.w.n + n0;
    if (rows == 16) {
      storex(out, sums[i]);
      continue;
    }
    storex(line, sums[i]);
    memcpy(out, line, (size_t)rows * sizeof(bf16));
  }
}

static void few_task(const TileRows& f, int64_t n0, bf16* y) {
  alignas(64) float c[4][256];
  const int64_t rows = smaller(16, f.w.n - n0), columns = pk::ceil_div(f.m, 16);
  if (columns == 1) few_products<1>(f, n0, rows, c);
  else if (columns == 2) few_products<2>(f, n0, rows, c);
  else if (columns == 3) few_products<3>(f, n0, rows, c);
  else few_products<4>(f, n0, rows, c);
  for (int64_t q = 0; q < columns; q++) few_store(f, n0, rows, q, c[q], y);
}

}  // namespace PK_NS
