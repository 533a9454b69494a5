// The fused linear for few rows (decode): codes are looked up in registers, a block's scale multiplies its
// partial sum once.
#pragma once
#include "gemv_wide_impl.h"

namespace PK_NS {

constexpr int MAX_ROWS = 8;  // rows of x that share one decode
// Rows of W a task: their partial sums and one piece of x stay in the first-level cache.
constexpr int TASK_ROWS = 32;

// A row of x -> fp32, in the order in which the codes come up.
template <typename T>
static void prepare_x(const T* x, int64_t k, [[maybe_unused]] bool grouped, float* out) {
#if defined(PK_AVX512)
  if (grouped) return prepare_wide(x, k, out);
#endif
  convert(x, k, out);
#if defined(PK_AVX2)
  for (int64_t g = 0; grouped && g < k; g += GROUP) {
    float natural[GROUP];
    memcpy(natural, out + g, sizeof natural);
    for (int i = 0; i < GROUP; i++) out[g + i] = natural[(i & 4) * 8 + i / 8 * 4 + (i & 3)];
  }
#endif
}

// total[r] += W[n][from ... from + count) * x[r][...] for whole groups: a block's scale multiplies its
// partial sum once.
template <int R>
static void gemv_piece(const pk_weight& w, const Table& table, int64_t n, int64_t from, int64_t count,
                       const float* const* x, vf* total) {
  const uint8_t* packed = (const uint8_t*)w.data + ((n * w.k + from) >> 1);
  const int shift = __builtin_ctz((unsigned)w.blocksize);
  for (int64_t i = 0; i < count; i += GROUP) {
    const vf scale = set1(pk::absmax_of(w, (n * w.k + from + i) >> shift));
    // Few rows: two chains each, or the additions wait for one another.
    constexpr int CHAINS = R <= 4 ? 2 : 1;
    vf values[GROUP / VW], acc[CHAINS][R] = {};
    // The next row's piece: short pieces are too short for the hardware's streams.
    __builtin_prefetch(packed + (i >> 1) + w.k / 2);
    lookup_group(table, packed + (i >> 1), values);
    for (int j = 0; j < GROUP / VW; j++)
      for (int r = 0; r < R; r++)
        acc[j % CHAINS][r] = fma(values[j], load(x[r] + from + i + j * VW), acc[j % CHAINS][r]);
    for (int r = 0; r < R; r++)
      total[r] = fma(CHAINS == 2 ? acc[0][r] + acc[CHAINS - 1][r] : acc[0][r], scale, total[r]);
  }
}

// The same for any shape: decode, then multiply; x in natural order.
template <int R>
static void gemv_piece_ragged(const pk_weight& w, const Table& table, int64_t n, int64_t from, int64_t count,
                              const float* const* x, vf* total) {
  alignas(64) float values[PIECE + VW];
  decode(w, table, n * w.k + from, count, values);
  int64_t i = 0;
  for (; i + VW <= count; i += VW)
    for (int r = 0; r < R; r++) total[r] = fma(load(values + i), load(x[r] + from + i), total[r]);
  for (; i < count; i++)
    for (int r = 0; r < R; r++) total[r][0] += values[i] * x[r][from + i];
}

static inline bool gemv_grouped(const pk_weight& w) {
#if defined(PK_AVX512)
  return w.code && w.k % w.blocksize == 0;
#else
  return w.code && w.k % GROUP == 0 && w.blocksize >= GROUP && w.k % w.blocksize == 0;
#endif
}

// Rows [n0, n0 + rows) of W against R rows of x -> out[row][MAX_ROWS].
template <int R>
static void gemv_task(const pk_weight& w, const Table& table, int64_t n0, int64_t rows, const float* const* x,
                      float (*out)[MAX_ROWS]) {
  vf total[TASK_ROWS][R] = {};
  const bool grouped = gemv_grouped(w);
  constexpr int64_t STEP = PIECE / R / STRIDE * STRIDE;
  for (int64_t from = 0; from < w.k; from += STEP) {
    const int64_t count = w.k - from < STEP ? w.k - from : STEP;
#if defined(PK_AVX512)
    if (grouped) {
      wide_rows<R>(w, table, n0, rows, from, count, x, total);
      continue;
    }
#endif
    for (int64_t i = 0; i < rows; i++) {
      if (grouped) gemv_piece<R>(w, table, n0 + i, from, count, x, total[i]);
      else gemv_piece_ragged<R>(w, table, n0 + i, from, count, x, total[i]);
    }
  }
  for (int64_t i = 0; i < rows; i++)
    for (int r = 0; r < R; r++) out[i][r] = sum(total[i][r]);
}

// The task for a number of rows of x known only now.
template <int R>
static void gemv_task_of(int count, const pk_weight& w, const Table& table, int64_t n0, int64_t rows,
                         const float* const* x, float (*out)[MAX_ROWS]) {
  if constexpr (R > 0) {
    if (count == R) gemv_task<R>(w, table, n0, rows, x, out);
    else gemv_task_of<R - 1>(count, w, table, n0, rows, x, out);
  }
}

static inline float dot(const float* a, const float* b, int64_t count) {
  vf total = vf{};
  int64_t i = 0;
  for (; i + VW <= count; i += VW) total = fma(load(a + i), load(b + i), total);
  float s = sum(total);
  for (; i < count; i++) s += a[i] * b[i];
  return s;
}

}  // namespace PK_NS
