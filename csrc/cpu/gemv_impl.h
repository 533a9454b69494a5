// The fused linear for few rows (decode): codes are looked up in registers, a block's scale multiplies its partial sum once.
#pragma once
#include "decode_impl.h"

namespace PK_NS {

constexpr int GROUP = 64;     // codes a step
constexpr int MAX_ROWS = 4;   // rows of x that share one decode
constexpr int64_t ABSMAX_CHUNK = 256;

// A row of x -> fp32. On AVX2 each group is permuted, so that lane i of step j is element 8i + j: 32-bit word i then holds the lanes' codes in
// nibble order, and one shift of the whole vector brings up the codes of a step.
template <typename T>
static void prepare_x(const T* x, int64_t k, [[maybe_unused]] bool permuted, float* out) {
#if defined(PK_AVX2)
  for (int64_t g = 0; permuted && g < k; g += GROUP) {
    vf rows[VW];
    for (int i = 0; i < VW; i++) rows[i] = loadx(x + g + i * VW);
    transpose(rows);
    for (int j = 0; j < VW; j++) store(out + g + j * VW, rows[j]);
  }
  if (permuted) return;
#endif
  convert(x, k, out);
}

// The eight vectors of a group in permuted order: step(j, value).
template <int R>
static inline void group_dot(const Table& table, const uint8_t* p, const float* const* x, int64_t g, vf* acc) {
#if defined(PK_AVX2)
  const __m256i words = _mm256_loadu_si256((const __m256i*)p);
  auto step = [&](auto right, auto left, int j) __attribute__((always_inline)) {
    __m256 low = _mm256_permutevar8x32_ps((__m256)table.low, right), high = _mm256_permutevar8x32_ps((__m256)table.high, right);
    vf value = (vf)_mm256_blendv_ps(low, high, (__m256)left);
    for (int r = 0; r < R; r++) acc[r] = fma(value, load(x[r] + g + j * VW), acc[r]);
  };
  step(_mm256_srli_epi32(words, 4), _mm256_slli_epi32(words, 24), 0);
  step(words, _mm256_slli_epi32(words, 28), 1);
  step(_mm256_srli_epi32(words, 12), _mm256_slli_epi32(words, 16), 2);
  step(_mm256_srli_epi32(words, 8), _mm256_slli_epi32(words, 20), 3);
  step(_mm256_srli_epi32(words, 20), _mm256_slli_epi32(words, 8), 4);
  step(_mm256_srli_epi32(words, 16), _mm256_slli_epi32(words, 12), 5);
  step(_mm256_srli_epi32(words, 28), words, 6);
  step(_mm256_srli_epi32(words, 24), _mm256_slli_epi32(words, 4), 7);
#else
  for (int j = 0; j < GROUP / VW; j++) {
    vf value = lookup(table, p + j * VW / 2);
    for (int r = 0; r < R; r++) acc[r] = fma(value, load(x[r] + g + j * VW), acc[r]);
  }
#endif
}

// Row n of W against R rows of x (fp32; whole groups permuted, the rest natural) -> out[R].
template <int R>
static void gemv_row(const pk_weight& w, const Table& table, int64_t n, const float* const* x, float* out) {
  const uint8_t* packed = (const uint8_t*)w.data;
  const int64_t start = n * w.k, groups = w.k / GROUP, per_block = w.blocksize / GROUP;
  vf total[R] = {};
  float scales[ABSMAX_CHUNK];
  for (int64_t g = 0; g < groups; g++) {
    if (g % ABSMAX_CHUNK == 0)
      for (int64_t i = g; i < groups && i < g + ABSMAX_CHUNK; i++) scales[i - g] = pk::absmax_of(w, start / w.blocksize + i / per_block);
    vf acc[R] = {};
    group_dot<R>(table, packed + ((start + g * GROUP) >> 1), x, g * GROUP, acc);
    for (int r = 0; r < R; r++) total[r] = fma(acc[r], set1(scales[g % ABSMAX_CHUNK]), total[r]);
  }
  for (int r = 0; r < R; r++) out[r] = sum(total[r]);
}

// Any shape: decode a piece of the row, then a plain dot product.
template <int R>
static void gemv_row_ragged(const pk_weight& w, const Table& table, int64_t n, const float* const* x, float* out) {
  constexpr int64_t PIECE = 512;
  alignas(64) float values[PIECE];
  vf total[R] = {};
  float rest[R] = {};
  for (int64_t from = 0; from < w.k; from += PIECE) {
    int64_t count = w.k - from < PIECE ? w.k - from : PIECE, i = 0;
    decode(w, table, n * w.k + from, count, values);
    for (; i + VW <= count; i += VW)
      for (int r = 0; r < R; r++) total[r] = fma(load(values + i), load(x[r] + from + i), total[r]);
    for (; i < count; i++)
      for (int r = 0; r < R; r++) rest[r] += values[i] * x[r][from + i];
  }
  for (int r = 0; r < R; r++) out[r] = sum(total[r]) + rest[r];
}

static inline bool gemv_aligned(const pk_weight& w) { return w.code && w.k % GROUP == 0 && w.blocksize >= GROUP && w.k % w.blocksize == 0; }

template <int R>
static inline void gemv_any(const pk_weight& w, const Table& table, int64_t n, const float* const* x, float* out) {
  if (gemv_aligned(w)) gemv_row<R>(w, table, n, x, out);
  else gemv_row_ragged<R>(w, table, n, x, out);
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
