// The AVX-512 decode of few rows: 128 codes of a row a step, so that 64 bytes hold eight codes for each of 16
// lanes, and a shift and a lookup bring up 16 of them. Two blocks of 64 lie side by side in the lanes; each
// lane's scale multiplies its partial sum once.
#pragma once
#include "decode_impl.h"

namespace PK_NS {

// Elements of x a pass over all its rows together: 16 KB, a third of a first-level cache.
constexpr int64_t PIECE = 4096;
// What a row's piece is a multiple of: a nested absmax then costs little beside the products.
constexpr int64_t STRIDE = 512;

#if defined(PK_AVX512)

constexpr int64_t WIDE = 128;              // codes a step: one cache line
constexpr int VECTORS = (int)(WIDE / VW);  // lookups that takes

// A row of x -> fp32, in steps of WIDE, zeros after its end: vector j of a step holds elements (j ^ 1), 8 +
// (j ^ 1), ..., nibble j of each 32-bit word of codes.
template <typename T>
static void prepare_wide(const T* x, int64_t k, float* out) {
  for (int64_t g = 0; g < k; g += WIDE) {
    float natural[WIDE] = {};
    convert(x + g, k - g < WIDE ? k - g : WIDE, natural);
    for (int j = 0; j < VECTORS; j++)
      for (int lane = 0; lane < VW; lane++) out[g + j * VW + lane] = natural[VECTORS * lane + (j ^ 1)];
  }
}

// The absmax of `count` blocks in fp32 -> out, and zeros for a whole vector after them.
static inline void wide_scales(const pk_weight& w, int64_t block, int64_t count, float* out) {
  store(out + count, vf{});
  if (w.absmax) {
    memcpy(out, w.absmax + block, (size_t)count * sizeof(float));
    return;
  }
  const int shift = __builtin_ctz((unsigned)w.nested_blocksize);
  const uint8_t* codes = w.absmax_8bit + block;
  const vf offset = set1(*w.absmax_offset);
  for (int64_t i = 0; i < count;) {  // a nested block at a time
    const int64_t index = (block + i) >> shift, end = ((index + 1) << shift) - block;
    const int64_t stop = end < count ? end : count;
    const vf scale = set1(w.nested_absmax[index]);
    for (; i < stop; i += VW) {
      const uint16_t some = stop - i < VW ? (uint16_t)((1u << (stop - i)) - 1) : (uint16_t)0xffff;
      const __m512i indices = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, codes + i));
      const vf values = (vf)_mm512_i32gather_ps(indices, w.absmax_code, 4);
      _mm512_mask_storeu_ps(out + i, some, (__m512)(values * scale + offset));  // pk::denested of a vector
    }
    i = stop;
  }
}

// Which of the scales from a step's first block on belongs to each lane.
static inline vi wide_lanes(int32_t blocksize) {
  const vi first = {0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120};  // code of each lane
  return first >> __builtin_ctz((unsigned)blocksize);
}

// What a pass over some columns of a task's rows shares.
template <int R>
struct WidePass {
  // Columns a pass, and the most blocks they have with what a whole vector reads beyond them.
  static constexpr int64_t STEP = PIECE / R / STRIDE * STRIDE, MOST = STEP / 32 + VW;
  vf codes;
  vi lanes;
  int shift;
  const uint8_t* packed;  // the first row's piece, rows `bytes` apart
  int64_t bytes, count;
  const float* x[R];
  float scales[4][MOST];  // of the rows that go together
};

// total[q][r] += W[first + q][piece] * x[r][piece], q < ROWS rows of W that share each load of x.
template <int ROWS, int R>
static void wide_piece(const WidePass<R>& pass, int64_t first, vf (*total)[R]) {
  const uint8_t* packed = pass.packed + first * pass.bytes;
  const int64_t bytes = pass.bytes, count = pass.count;
  const float (*scales)[WidePass<R>::MOST] = pass.scales;
  const vf codes = pass.codes;
  const vi lanes = pass.lanes;
  const int shift = pass.shift;
  vf sums[ROWS][R];
  for (int q = 0; q < ROWS; q++)
    for (int r = 0; r < R; r++) sums[q][r] = total[q][r];
  const auto step = [&](int64_t i, const vu* words) __attribute__((always_inline)) {
    vf acc[ROWS][R] = {};
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++)
      for (int q = 0; q < ROWS; q++) {
        // Reads the low four bits only.
        const vf value = (vf)_mm512_permutexvar_ps((__m512i)(words[q] >> (4 * j)), (__m512)codes);
        for (int r = 0; r < R; r++) acc[q][r] = fma(value, load(pass.x[r] + i + j * VW), acc[q][r]);
      }
    for (int q = 0; q < ROWS; q++) {
      const vf scale = (vf)_mm512_permutexvar_ps((__m512i)lanes, (__m512)load(scales[q] + (i >> shift)));
      for (int r = 0; r < R; r++) sums[q][r] = fma(acc[q][r], scale, sums[q][r]);
    }
  };
  vu words[ROWS];
  int64_t i = 0;
  for (; i + WIDE <= count; i += WIDE) {
    for (int q = 0; q < ROWS; q++) {
      memcpy(&words[q], packed + q * bytes + i / 2, sizeof words[q]);
      // A piece is too short for the hardware's streams.
      __builtin_prefetch(packed + (q + ROWS) * bytes + i / 2);
    }
    step(i, words);
  }
  if (i < count) {
    const uint16_t rest = (uint16_t)((1u << (count - i) / VECTORS) - 1);
    for (int q = 0; q < ROWS; q++) words[q] = (vu)_mm512_maskz_loadu_epi32(rest, packed + q * bytes + i / 2);
    step(i, words);
  }
  for (int q = 0; q < ROWS; q++)
    for (int r = 0; r < R; r++) total[q][r] = sums[q][r];
}

// Columns [from, from + count) of `rows` rows of W, several rows at a time as registers allow.
template <int R>
static void wide_rows(const pk_weight& w, const Table& table, int64_t n0, int64_t rows, int64_t from,
                      int64_t count, const float* const* x, vf (*total)[R]) {
  constexpr int ROWS = R <= 2 ? 4 : R <= 4 ? 2 : 1;
  WidePass<R> pass;
  pass.codes = table.all, pass.lanes = wide_lanes(w.blocksize),
  pass.shift = __builtin_ctz((unsigned)w.blocksize);
  pass.bytes = w.k / 2, pass.count = count, pass.packed = (const uint8_t*)w.data + n0 * pass.bytes + from / 2;
  const int64_t blocks = (count + w.blocksize - 1) >> pass.shift;
  for (int r = 0; r < R; r++) pass.x[r] = x[r] + from;
  for (int64_t i = 0; i < rows;) {
    const int together = i + ROWS <= rows ? ROWS : 1;
    for (int q = 0; q < together; q++)
      wide_scales(w, ((n0 + i + q) * w.k + from) >> pass.shift, blocks, pass.scales[q]);
    if (together == ROWS) wide_piece<ROWS, R>(pass, i, total + i);
    else wide_piece<1, R>(pass, i, total + i);
    i += together;
  }
}

#endif

}  // namespace PK_NS
