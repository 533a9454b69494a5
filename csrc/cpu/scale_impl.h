// y = u * scale + bias by columns (DoRA's magnitudes), and its gradients in one read of dy and u.
#pragma once
#include "column_sum.h"

namespace PK_NS {

template <typename T>
static void scale_columns_as(const T* u, int64_t m, int64_t n, const float* scale, const float* bias, T* y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < m; i++) {
    const T* in = u + i * n;
    T* out = y + i * n;
    int64_t j = 0;
    for (; j + VW <= n; j += VW) storex(out + j, fma(loadx(in + j), load(scale + j), bias ? load(bias + j) : vf{}));
    for (; j < n; j++) from_float(to_float(in[j]) * scale[j] + (bias ? bias[j] : 0.0f), out + j);
  }
}

// Eight rows of LANES columns: du, and the sums of dy * u and dy over them. ALL: none of the columns is beyond the matrix.
template <bool ALL, typename T>
static inline __attribute__((always_inline)) void scale_columns_grad_tile(const T* dy, const T* u, int64_t ld, int64_t rows, int64_t width, const float* scale,
                                                                          T* du, vf* by_scale, vf* by_bias) {
  T edge[2][LANES] = {};
  for (int64_t i = 0; i < rows; i++, dy += ld, u += ld) {
    const T *g = dy, *x = u;
    if (!ALL) {
      memcpy(edge[0], dy, (size_t)width * sizeof(T));
      memcpy(edge[1], u, (size_t)width * sizeof(T));
      g = edge[0], x = edge[1];
    }
    for (int half = 0; half < 2; half++) {
      const vf v = loadx(g + half * VW);
      by_scale[half] = fma(v, loadx(x + half * VW), by_scale[half]);
      by_bias[half] += v;
      if (!du) continue;
      if (ALL) storex(du + i * ld + half * VW, v * load(scale + half * VW));
      else
        for (int64_t j = half * VW; j < width && j < (half + 1) * VW; j++) from_float(to_float(g[j]) * scale[j], du + i * ld + j);
    }
  }
}

// A strip of columns a task, wide enough for whole cache lines of several kilobytes a group of rows.
constexpr int64_t SCALE_STRIP = 8 * LANES;

template <typename T>
static void scale_columns_grad_as(const T* dy, const T* u, int64_t m, int64_t n, const float* scale, T* du, float* d_scale, float* d_bias, int threads) {
  const int64_t strips = (n + SCALE_STRIP - 1) / SCALE_STRIP;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t strip = 0; strip < strips; strip++) {
    const int64_t from = strip * SCALE_STRIP, all = n - from < SCALE_STRIP ? n - from : SCALE_STRIP;
    ColumnSum by_scale[SCALE_STRIP / LANES], by_bias[SCALE_STRIP / LANES];
    for (int64_t i = 0; i < m; i += ColumnSum::CHAIN) {
      const int64_t rows = m - i < ColumnSum::CHAIN ? m - i : ColumnSum::CHAIN;
      for (int64_t q = 0; q < all; q += LANES) {
        const int64_t width = all - q < LANES ? all - q : LANES, at = i * n + from + q;
        vf part[2] = {}, bias[2] = {};
        T* out = du ? du + at : nullptr;
        if (width == LANES) scale_columns_grad_tile<true>(dy + at, u + at, n, rows, width, scale + from + q, out, part, bias);
        else scale_columns_grad_tile<false>(dy + at, u + at, n, rows, width, scale + from + q, out, part, bias);
        memcpy(by_scale[q / LANES].part, part, sizeof part);
        memcpy(by_bias[q / LANES].part, bias, sizeof bias);
        by_scale[q / LANES].close(i + rows, m, LANES);
        by_bias[q / LANES].close(i + rows, m, LANES);
      }
    }
    for (int64_t j = 0; j < all; j++) {
      if (d_scale) d_scale[from + j] = by_scale[j / LANES].total[j % LANES];
      if (d_bias) d_bias[from + j] = by_bias[j / LANES].total[j % LANES];
    }
  }
}

// norm [n] = sqrt(squares + 2 s rowsum(cross^T o B) + s^2 rowsum(B G o B)), cross [r][n] = A W^T, G [r][r] = A A^T, and scale = magnitude / norm.
template <typename B>
static void dora_norm_as(const float* cross, const float* gram, const B* b, int64_t n, int64_t r, float s, const float* squares, const float* magnitude,
                         float* norm, float* scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; i++) {
    float row[256], mixed[256];
    for (int64_t j = 0; j < r; j++) row[j] = to_float(b[i * r + j]), mixed[j] = 0.0f;
    for (int64_t q = 0; q < r; q++)
      for (int64_t j = 0; j < r; j++) mixed[j] += row[q] * gram[q * r + j];
    float with_w = 0.0f, own = 0.0f;
    for (int64_t j = 0; j < r; j++) with_w += cross[j * n + i] * row[j], own += mixed[j] * row[j];
    const float total = squares[i] + 2.0f * s * with_w + s * s * own;
    norm[i] = total > 0.0f ? __builtin_sqrtf(total) : total == total ? 0.0f : total;
    scale[i] = magnitude[i] / norm[i];
  }
}

static void dora_norm(const float* cross, const float* gram, const void* b, int dtype, int64_t n, int64_t r, float s, const float* squares,
                      const float* magnitude, float* norm, float* scale, int threads) {
  if (dtype == PK_F32) dora_norm_as(cross, gram, (const float*)b, n, r, s, squares, magnitude, norm, scale, threads);
  else if (dtype == PK_BF16) dora_norm_as(cross, gram, (const bf16*)b, n, r, s, squares, magnitude, norm, scale, threads);
  else dora_norm_as(cross, gram, (const f16*)b, n, r, s, squares, magnitude, norm, scale, threads);
}

static void scale_columns(const void* u, int dtype, int64_t m, int64_t n, const float* scale, const float* bias, void* y, int threads) {
  if (dtype == PK_F32) scale_columns_as((const float*)u, m, n, scale, bias, (float*)y, threads);
  else if (dtype == PK_BF16) scale_columns_as((const bf16*)u, m, n, scale, bias, (bf16*)y, threads);
  else scale_columns_as((const f16*)u, m, n, scale, bias, (f16*)y, threads);
}

static void scale_columns_grad(const void* dy, const void* u, int dtype, int64_t m, int64_t n, const float* scale, void* du, float* d_scale, float* d_bias,
                               int threads) {
  if (dtype == PK_F32) scale_columns_grad_as((const float*)dy, (const float*)u, m, n, scale, (float*)du, d_scale, d_bias, threads);
  else if (dtype == PK_BF16) scale_columns_grad_as((const bf16*)dy, (const bf16*)u, m, n, scale, (bf16*)du, d_scale, d_bias, threads);
  else scale_columns_grad_as((const f16*)dy, (const f16*)u, m, n, scale, (f16*)du, d_scale, d_bias, threads);
}

}  // namespace PK_NS
