// The matrix engine all large products share: C^T[row][lane] += sum_c W'[row][c] * X[c][lane].
//
// X lies in panels of LANES columns (packed once, fp32); W' is a decoded piece of the weight or an adapter,
// and is only ever read one value at a time (broadcast), so it needs no packing: its two strides say whether
// it is used as stored or transposed. The same kernel therefore serves y = x W^T (rows n, contraction k) and
// dx = dy W (rows k, contraction n), and every low-rank product.
#pragma once
#include "decode_impl.h"

namespace PK_NS {

// An engine operand read by broadcast: value (row, c) at p[row * row_stride + c * c_stride].
struct Rows {
  const float* p;
  int64_t row_stride, c_stride;
};

// Additions in one chain. A rounding error grows with the chain's length; the low-rank products, a few
// percent of the work whose sums go into every gradient, afford short ones.
constexpr int64_t MAIN_CHAIN = 128, LOW_RANK_CHAIN = 32;

// c[r][0..LANES) += sum over kc of w(r, i) * x[i][0..LANES), r < R; the sum in chains, each added to c.
template <int R>
static void micro(Rows w, const float* x, int64_t kc, int64_t chain, float* c, int64_t ldc) {
  // Wanted at the end, in the second-level cache till then.
  for (int r = 0; r < R; r++) __builtin_prefetch(c + r * ldc, 1);
  // One pointer per three rows: the addresses p, p + s, p + 2s need no more registers.
  const float* p[(R + 2) / 3];
  for (int r = 0; r < R; r += 3) p[r / 3] = w.p + r * w.row_stride;
  const int64_t s = w.row_stride;
  while (kc > 0) {
    vf acc[R][2] = {};
    const float* end = x + (kc < chain ? kc : chain) * LANES;
    kc -= chain;
#pragma GCC unroll 4
    while (x < end) {
      vf x0 = load(x), x1 = load(x + VW);
      x += LANES;
      for (int r = 0; r < R; r++) {
        vf b = set1(p[r / 3][(r % 3) * s]);
        acc[r][0] = fma(b, x0, acc[r][0]);
        acc[r][1] = fma(b, x1, acc[r][1]);
      }
      for (int q = 0; q < (R + 2) / 3; q++) p[q] += w.c_stride;
    }
    for (int r = 0; r < R; r++) {
      store(c + r * ldc, load(c + r * ldc) + acc[r][0]);
      store(c + r * ldc + VW, load(c + r * ldc + VW) + acc[r][1]);
    }
  }
}

template <int R>
static void micro_tail(int rows, Rows w, const float* x, int64_t kc, int64_t chain, float* c, int64_t ldc) {
  if constexpr (R > 0) {
    if (rows == R) micro<R>(w, x, kc, chain, c, ldc);
    else micro_tail<R - 1>(rows, w, x, kc, chain, c, ldc);
  }
}

// All `rows` of one panel: c [rows][ldc] += W' x.
static void multiply(Rows w, int64_t rows, const float* x, int64_t kc, float* c, int64_t ldc,
                     int64_t chain = MAIN_CHAIN) {
  int64_t r = 0;
  for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
    micro<TILE_ROWS>({w.p + r * w.row_stride, w.row_stride, w.c_stride}, x, kc, chain, c + r * ldc, ldc);
  if (r < rows)
    micro_tail<TILE_ROWS - 1>((int)(rows - r), {w.p + r * w.row_stride, w.row_stride, w.c_stride}, x, kc,
                              chain, c + r * ldc, ldc);
}

// dst [cols][LANES] = src [rows <= LANES][cols] transposed; missing lanes are zero. `ld`: elements between
// rows of src.
template <typename T>
static void pack_transposed(const T* src, int64_t ld, int64_t rows, int64_t cols, float* dst) {
  for (int half = 0; half < LANES; half += VW) {
    int64_t j = 0;
    for (; j + VW <= cols; j += VW) {
      vf r[VW];
      for (int i = 0; i < VW; i++) r[i] = half + i < rows ? loadx(src + (half + i) * ld + j) : vf{};
      transpose(r);
      for (int i = 0; i < VW; i++) store(dst + (j + i) * LANES + half, r[i]);
    }
    for (; j < cols; j++)
      for (int i = 0; i < VW; i++)
        dst[j * LANES + half + i] = half + i < rows ? to_float(src[(half + i) * ld + j]) : 0.0f;
  }
}

// dst [rows][LANES] = src [rows][cols <= LANES], padded with zeros.
template <typename T>
static void pack_rows(const T* src, int64_t ld, int64_t rows, int64_t cols, float* dst) {
  for (int64_t i = 0; i < rows; i++, dst += LANES, src += ld) {
    if (cols >= LANES) {
      store(dst, loadx(src));
      store(dst + VW, loadx(src + VW));
      continue;
    }
    for (int64_t j = 0; j < LANES; j++) dst[j] = j < cols ? to_float(src[j]) : 0.0f;
  }
}

// out [lanes <= LANES][rows] = c [rows][ldc] transposed, plus bias [rows] (may be null), plus out itself
// where `accumulate`.
template <typename T>
static void store_transposed(const float* c, int64_t ldc, int64_t rows, int64_t lanes, const float* bias,
                             T* out, int64_t ld, bool accumulate) {
  int64_t j = 0;
  for (; j + VW <= rows; j += VW)
    for (int half = 0; half < LANES; half += VW) {
      vf r[VW];
      for (int i = 0; i < VW; i++) r[i] = load(c + (j + i) * ldc + half);
      transpose(r);
      vf add = bias ? load(bias + j) : vf{};
      for (int i = 0; i < VW && half + i < lanes; i++) {
        T* o = out + (half + i) * ld + j;
        storex(o, r[i] + (accumulate ? loadx(o) + add : add));
      }
    }
  for (; j < rows; j++)
    for (int64_t l = 0; l < lanes; l++) {
      T* o = out + l * ld + j;
      from_float(c[j * ldc + l] + (bias ? bias[j] : 0.0f) + (accumulate ? to_float(*o) : 0.0f), o);
    }
}

// out [rows][cols <= LANES] = scale * c [rows][ldc].
template <typename T>
static void store_rows(const float* c, int64_t ldc, int64_t rows, int64_t cols, float scale, T* out,
                       int64_t ld) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < cols; j++) from_float(c[i * ldc + j] * scale, &out[i * ld + j]);
}

}  // namespace PK_NS
