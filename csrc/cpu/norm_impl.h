// RMSNorm and its backward, a row at a time: the second look at a row finds it in the cache. fp32 inside.
// With a residual stream: the sum is formed row by row before its norm, and the stream's gradient is added
// where the norm's is in registers.
#pragma once
#include "kernels.h"
#include "math_impl.h"
#include "qlora_impl.h"

namespace PK_NS {

constexpr int64_t NORM_PARALLEL = 1 << 14;  // elements from which a parallel region pays. Not measured.

// v rounded to T, as fp32.
static inline __attribute__((always_inline)) vf rounded(vf v, const float*) { return v; }
static inline __attribute__((always_inline)) vf rounded(vf v, const bf16*) {
  return (vf)(round_bf16(v) << 16);
}
static inline __attribute__((always_inline)) vf rounded(vf v, const f16*) {
  f16 part[VW];
  storex(part, v);
  return loadx(part);
}

// 1 / sqrt(v) by Newton's steps in double, right to the last bit but for ties; without libm, whose sqrt sets
// errno.
static float reciprocal_root(float v) {
  if (!(v > 0.0f && v < bits_to_float(0x7f800000)))
    return v == 0.0f ? bits_to_float(0x7f800000) : v > 0.0f ? 0.0f : bits_to_float(0x7fc00000);
  const double half = 0.5 * (double)v;
  uint64_t bits;
  double y = (double)v;
  memcpy(&bits, &y, sizeof bits);
  bits = 0x5fe6eb50c7b537a9u - (bits >> 1);
  memcpy(&y, &bits, sizeof y);
  for (int i = 0; i < 5; i++) y *= 1.5 - half * y * y;
  return (float)y;
}

template <typename T>
static float sum_of_squares(const T* x, int64_t n) {
  vf s[4] = {};
  int64_t i = 0;
  for (; i + 4 * VW <= n; i += 4 * VW)
    for (int j = 0; j < 4; j++) {
      const vf v = loadx(x + i + j * VW);
      s[j] = fma(v, v, s[j]);
    }
  for (; i < n; i += VW) {
    const vf v = load_some(x + i, n - i);
    s[0] = fma(v, v, s[0]);
  }
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

static const float* norm_weight(const pk_rms_norm& a, float* out) {
  const float* w = as_float(a.weight, a.weight_dtype, a.n, out);
  if (a.cast == PK_CAST_LLAMA) return w;
  for (int64_t i = 0; i < a.n; i++) out[i] = a.offset + w[i];
  return out;
}

// s = x + residual, rounded once.
template <typename T>
static void add_row(const T* x, const T* residual, int64_t n, T* s) {
  for (int64_t i = 0; i < n; i += VW)
    store_some(s + i, load_some(x + i, n - i) + load_some(residual + i, n - i), n - i);
}

template <bool LLAMA, typename T, typename Y>
static void rms_norm_of(const pk_rms_norm& a, const T* x, const T* residual, T* s, Y* y, float* rstd,
                        float* scratch, int threads) {
  const float* w = norm_weight(a, scratch);
  const int64_t n = a.n;
#pragma omp parallel for schedule(static) num_threads(threads) if (a.m * n >= NORM_PARALLEL)
  for (int64_t row = 0; row < a.m; row++) {
    const T* from = x + row * a.ld_x;
    if (s) {
      add_row(from, residual + row * n, n, s + row * n);
      from = s + row * n;
    }
    rstd[row] = reciprocal_root(sum_of_squares(from, n) / (float)n + a.eps);
    const vf r = set1(rstd[row]);
    for (int64_t i = 0; i < n; i += VW) {
      const vf normal_x = load_some(from + i, n - i) * r;
      store_some(y + row * n + i,
                 (LLAMA ? rounded(normal_x, (const T*)nullptr) : normal_x) * load_some(w + i, n - i), n - i);
    }
  }
}

// With g = dy * w and x^ = x * rstd: dx = rstd (g - x^ mean(g x^)) + ds; d_weight sums dy * x^ (as it met the
// weight) over the task's rows.
template <bool LLAMA, typename T, typename Y>
static void rms_norm_grad_row(const T* x, const Y* dy, const T* ds, const float* w, int64_t n, float rstd,
                              T* dx, float* d_weight) {
  const vf r = set1(rstd);
  vf s[2] = {};
  for (int64_t i = 0; i < n; i += VW) {
    const int64_t count = n - i;
    const vf normal_x = load_some(x + i, count) * r, d = load_some(dy + i, count);
    vf& part = s[i / VW % 2];
    part = fma(d * load_some(w + i, count), normal_x, part);
    if (d_weight)
      store_some(
          d_weight + i,
          fma(d, LLAMA ? rounded(normal_x, (const T*)nullptr) : normal_x, load_some(d_weight + i, count)),
          count);
  }
  if (!dx) return;
  // dx = g rstd - x rstd^2 mean(g x^): x itself is exact, and a product less is rounded.
  const vf share = set1((float)(-(double)rstd * rstd * (sum(s[0] + s[1]) / (double)n)));
  for (int64_t i = 0; i < n; i += VW) {
    const int64_t count = n - i;
    const vf d = fma(load_some(x + i, count), share, load_some(dy + i, count) * load_some(w + i, count) * r);
    store_some(dx + i, ds ? d + load_some(ds + i, count) : d, count);
  }
}

template <bool LLAMA, typename T, typename Y>
static void rms_norm_grad_of(const pk_rms_norm& a, const T* x, const Y* dy, const T* ds, const float* rstd,
                             T* dx, float* d_weight, float* scratch, int threads) {
  const float* w = norm_weight(a, scratch);
  const int64_t n = a.n, rows = pk::norm_rows(a.m), tasks = pk::norm_tasks(a.m);
  float* partial = scratch + n;
#pragma omp parallel for schedule(static) num_threads(threads) if (a.m * n >= NORM_PARALLEL)
  for (int64_t task = 0; task < tasks; task++) {
    float* own = d_weight ? partial + task * n : nullptr;
    if (own) clear(own, n);
    for (int64_t row = task * rows; row < smaller(a.m, (task + 1) * rows); row++)
      rms_norm_grad_row<LLAMA>(x + row * a.ld_x, dy + row * n, ds ? ds + row * n : nullptr, w, n, rstd[row],
                               dx ? dx + row * n : nullptr, own);
  }
  if (!d_weight) return;
  memcpy(d_weight, partial, (size_t)n * sizeof(float));
  for (int64_t task = 1; task < tasks; task++)
    for (int64_t i = 0; i < n; i++) d_weight[i] += partial[task * n + i];
}

template <typename T, typename Y>
static void rms_norm_as(const pk_rms_norm& a, const void* residual, void* s, Y* y, float* rstd,
                        float* scratch, int threads) {
  if (a.cast == PK_CAST_LLAMA)
    rms_norm_of<true>(a, (const T*)a.x, (const T*)residual, (T*)s, y, rstd, scratch, threads);
  else rms_norm_of<false>(a, (const T*)a.x, (const T*)residual, (T*)s, y, rstd, scratch, threads);
}
template <typename T, typename Y>
static void rms_norm_grad_as(const pk_rms_norm& a, const Y* dy, const void* ds, const float* rstd, void* dx,
                             float* d_weight, float* scratch, int threads) {
  if (a.cast == PK_CAST_LLAMA)
    rms_norm_grad_of<true>(a, (const T*)a.x, dy, (const T*)ds, rstd, (T*)dx, d_weight, scratch, threads);
  else rms_norm_grad_of<false>(a, (const T*)a.x, dy, (const T*)ds, rstd, (T*)dx, d_weight, scratch, threads);
}

static void rms_norm(const pk_rms_norm& a, const void* residual, void* s, void* y, float* rstd,
                     float* scratch, int threads) {
  if (a.dtype == PK_F32) rms_norm_as<float>(a, residual, s, (float*)y, rstd, scratch, threads);
  else if (a.dtype == PK_BF16 && a.y_dtype == PK_F32)
    rms_norm_as<bf16>(a, residual, s, (float*)y, rstd, scratch, threads);
  else if (a.dtype == PK_BF16) rms_norm_as<bf16>(a, residual, s, (bf16*)y, rstd, scratch, threads);
  else if (a.y_dtype == PK_F32) rms_norm_as<f16>(a, residual, s, (float*)y, rstd, scratch, threads);
  else rms_norm_as<f16>(a, residual, s, (f16*)y, rstd, scratch, threads);
}

static void rms_norm_grad(const pk_rms_norm& a, const void* dy, const void* ds, const float* rstd, void* dx,
                          float* d_weight, float* scratch, int threads) {
  if (a.dtype == PK_F32)
    rms_norm_grad_as<float>(a, (const float*)dy, ds, rstd, dx, d_weight, scratch, threads);
  else if (a.dtype == PK_BF16 && a.y_dtype == PK_F32)
    rms_norm_grad_as<bf16>(a, (const float*)dy, ds, rstd, dx, d_weight, scratch, threads);
  else if (a.dtype == PK_BF16)
    rms_norm_grad_as<bf16>(a, (const bf16*)dy, ds, rstd, dx, d_weight, scratch, threads);
  else if (a.y_dtype == PK_F32)
    rms_norm_grad_as<f16>(a, (const float*)dy, ds, rstd, dx, d_weight, scratch, threads);
  else rms_norm_grad_as<f16>(a, (const f16*)dy, ds, rstd, dx, d_weight, scratch, threads);
}

}  // namespace PK_NS
