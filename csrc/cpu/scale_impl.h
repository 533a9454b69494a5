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

template <typename T>
static void scale_columns_grad_as(const T* dy, const T* u, int64_t m, int64_t n, const float* scale, T* du, float* d_scale, float* d_bias, int threads) {
  const int64_t strips = (n + LANES - 1) / LANES;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t strip = 0; strip < strips; strip++) {
    const int64_t from = strip * LANES, width = n - from < LANES ? n - from : LANES;
    ColumnSum by_scale, by_bias;
    for (int64_t i = 0; i < m; i++) {
      const T *g = dy + i * n + from, *x = u + i * n + from;
      T* out = du ? du + i * n + from : nullptr;
      for (int64_t j = 0; j < width; j++) {
        const float v = to_float(g[j]);
        by_scale.part[j] += v * to_float(x[j]);
        by_bias.part[j] += v;
        if (out) from_float(v * scale[from + j], out + j);
      }
      by_scale.close(i + 1, m, width);
      by_bias.close(i + 1, m, width);
    }
    for (int64_t j = 0; j < width; j++) {
      if (d_scale) d_scale[from + j] = by_scale.total[j];
      if (d_bias) d_bias[from + j] = by_bias.total[j];
    }
  }
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
