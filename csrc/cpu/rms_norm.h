// RMSNorm and its backward, a row at a time: the second look at a row finds it in the cache. fp32 inside.
// With a residual stream: the sum is formed row by row before its norm, and the stream's gradient is added
// where the norm's is in registers.
#pragma once
#include "ops.h"

namespace pk {

struct RmsNorm {
  const pk_rms_norm& norm;
  const void* residual;  // these two of a norm of a sum, else null
  void* s;
  void* y;
  float *rstd, *scratch;
};

struct RmsNormGrad {
  const pk_rms_norm& norm;
  const void* dy;
  const void* ds;  // of a norm of a sum, else null
  const float* rstd;
  void* dx;         // may be null, as d_weight
  float* d_weight;  // [n]
  float* scratch;
};

// Rows of a task of the normalization's backward: a function of m alone, so that the order of sums does not
// depend on the threads.
static inline int64_t norm_rows(int64_t m) { return m <= 8 * 64 ? 8 : (m + 63) / 64; }
static inline int64_t norm_tasks(int64_t m) { return (m + norm_rows(m) - 1) / norm_rows(m); }

}  // namespace pk

#if defined(PK_NS)  // the kernel, compiled once a level
#include "add.h"
#include "qlora_impl.h"
#include "vectors.h"

namespace PK_NS {

constexpr int64_t NORM_PARALLEL = 1 << 14;  // elements from which a parallel region pays. Not measured.

// v rounded to T, as fp32.
PK_INLINE vf rounded(vf v, const float*) { return v; }
PK_INLINE vf rounded(vf v, const bf16*) { return (vf)(round_bf16(v) << 16); }
PK_INLINE vf rounded(vf v, const f16*) {
  f16 part[VW];
  storex(part, v);
  return loadx(part);
}
template <typename T, typename V>
PK_INLINE Beside<V> rounded(Beside<V> v, const T* of) {
  return {rounded(v.a, of), rounded(v.b, of)};
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
  vf4 sums = {};
  by_vectors<vf4>(0, n, [&](int64_t i, auto some) {
    const auto v = some.load(x + i);
    some.of(sums) = fma(v, v, some.of(sums));
  });
  return sum(folded(sums));
}

static const float* norm_weight(const pk_rms_norm& a, float* out) {
  const float* w = as_float(a.weight, a.weight_dtype, a.n, out);
  if (a.cast == PK_CAST_LLAMA) return w;
  for (int64_t i = 0; i < a.n; i++) out[i] = a.offset + w[i];
  return out;
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
    const float reciprocal = reciprocal_root(sum_of_squares(from, n) / (float)n + a.eps);
    rstd[row] = reciprocal;
    by_vectors<vf4>(0, n, [&](int64_t i, auto some) {
      auto v = some.load(from + i);
      v = v * constant<decltype(v)>(reciprocal);
      if (LLAMA) v = rounded(v, (const T*)nullptr);
      some.store(y + row * n + i, v * some.load(w + i));
    });
  }
}

// With g = dy * w and x^ = x * rstd: dx = rstd (g - x^ mean(g x^)) + ds; d_weight sums dy * x^ (as it met the
// weight) over the task's rows.
template <bool LLAMA, typename T, typename Y>
static void rms_norm_grad_row(const T* x, const Y* dy, const T* ds, const float* w, int64_t n, float rstd,
                              T* dx, float* d_weight) {
  vf4 sums = {};
  by_vectors<vf4>(0, n, [&](int64_t i, auto some) {
    auto normal_x = some.load(x + i), d = some.load(dy + i);
    normal_x = normal_x * constant<decltype(d)>(rstd);
    some.of(sums) = fma(d * some.load(w + i), normal_x, some.of(sums));
    if (!d_weight) return;
    if (LLAMA) normal_x = rounded(normal_x, (const T*)nullptr);
    some.store(d_weight + i, fma(d, normal_x, some.load(d_weight + i)));
  });
  if (!dx) return;
  // dx = g rstd - x rstd^2 mean(g x^): x itself is exact, and a product less is rounded.
  const float share = (float)(-(double)rstd * rstd * (sum(folded(sums)) / (double)n));
  by_vectors<vf4>(0, n, [&](int64_t i, auto some) {
    auto d = some.load(dy + i) * some.load(w + i);
    d = d * constant<decltype(d)>(rstd);
    d = fma(some.load(x + i), constant<decltype(d)>(share), d);
    some.store(dx + i, ds ? d + some.load(ds + i) : d);
  });
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

// By the dtypes of x and of y (or dy), which is x's or fp32.
template <typename F>
static void by_norm_dtypes(const pk_rms_norm& a, F run) {
  by_dtype(a.dtype, [&](auto value) {
    if (a.y_dtype == PK_F32) run(value, 0.0f);
    else run(value, value);
  });
}

static void rms_norm(const pk::RmsNorm& of, int threads) {
  by_norm_dtypes(of.norm, [&](auto value, auto out) {
    using T = decltype(value);
    using Y = decltype(out);
    const T *x = (const T*)of.norm.x, *residual = (const T*)of.residual;
    const bool llama = of.norm.cast == PK_CAST_LLAMA;
    if (llama) rms_norm_of<true>(of.norm, x, residual, (T*)of.s, (Y*)of.y, of.rstd, of.scratch, threads);
    else rms_norm_of<false>(of.norm, x, residual, (T*)of.s, (Y*)of.y, of.rstd, of.scratch, threads);
  });
}

static void rms_norm_grad(const pk::RmsNormGrad& of, int threads) {
  by_norm_dtypes(of.norm, [&](auto value, auto out) {
    using T = decltype(value);
    const T *x = (const T*)of.norm.x, *ds = (const T*)of.ds;
    const auto* dy = (const decltype(out)*)of.dy;
    const bool llama = of.norm.cast == PK_CAST_LLAMA;
    if (llama)
      rms_norm_grad_of<true>(of.norm, x, dy, ds, of.rstd, (T*)of.dx, of.d_weight, of.scratch, threads);
    else rms_norm_grad_of<false>(of.norm, x, dy, ds, of.rstd, (T*)of.dx, of.d_weight, of.scratch, threads);
  });
}

}  // namespace PK_NS

#else  // the C function, compiled once, in dispatch.cpp
#include "entry.h"

namespace pk {

static inline int check_norm(const pk_rms_norm* a) {
  if (!a) return PK_ERR_NULL;
  if (a->n < 1 || !matrix(a->m, a->n) || !rows_apart(a->m, a->n, a->ld_x)) return PK_ERR_SHAPE;
  if (a->cast != PK_CAST_LLAMA && a->cast != PK_CAST_GEMMA) return PK_ERR_SHAPE;
  if (bad_dtype(a->dtype) || bad_dtype(a->weight_dtype) || (a->y_dtype != a->dtype && a->y_dtype != PK_F32))
    return PK_ERR_DTYPE;
  return PK_OK;
}

}  // namespace pk

extern "C" {

int64_t pk_rms_norm_scratch_bytes(int64_t m, int64_t n, int with_d_weight) {
  if (n < 1 || !matrix(m, n)) return 0;
  return bytes_of(n * (1 + (with_d_weight ? norm_tasks(m) : 0)));
}

// residual and s: of a norm of a sum (`sum`), else null.
static int norm_forward(const pk_rms_norm* norm, bool sum, const void* residual, void* s, void* y,
                        float* rstd, void* scratch, int64_t bytes, int threads) {
  if (int bad = check_norm(norm)) return bad;
  if (norm->m == 0) return PK_OK;
  if (!norm->x || !norm->weight || !y || !rstd || !scratch) return PK_ERR_NULL;
  if (sum && (!residual || !s)) return PK_ERR_NULL;
  if (bytes < pk_rms_norm_scratch_bytes(norm->m, norm->n, 0)) return PK_ERR_SCRATCH;
  current->rms_norm({*norm, residual, s, y, rstd, aligned(scratch)}, threads_or_default(threads));
  return PK_OK;
}
int pk_rms_norm_fwd_cpu(const pk_rms_norm* norm, void* y, float* rstd, void* scratch, int64_t bytes,
                        int threads) {
  return norm_forward(norm, false, nullptr, nullptr, y, rstd, scratch, bytes, threads);
}
int pk_add_rms_norm_fwd_cpu(const pk_rms_norm* norm, const void* residual, void* s, void* y, float* rstd,
                            void* scratch, int64_t bytes, int threads) {
  return norm_forward(norm, true, residual, s, y, rstd, scratch, bytes, threads);
}

// ds: of a norm of a sum, whose dx is not optional.
static int norm_backward(const pk_rms_norm* norm, bool sum, const void* dy, const void* ds, const float* rstd,
                         void* dx, float* d_weight, void* scratch, int64_t bytes, int threads) {
  if (int bad = check_norm(norm)) return bad;
  if (norm->m == 0) return d_weight ? PK_ERR_SHAPE : PK_OK;
  if (!norm->x || !norm->weight || !dy || !rstd || !scratch) return PK_ERR_NULL;
  if (sum && (!ds || !dx)) return PK_ERR_NULL;
  if (bytes < pk_rms_norm_scratch_bytes(norm->m, norm->n, d_weight != nullptr)) return PK_ERR_SCRATCH;
  current->rms_norm_grad({*norm, dy, ds, rstd, dx, d_weight, aligned(scratch)}, threads_or_default(threads));
  return PK_OK;
}
int pk_rms_norm_bwd_cpu(const pk_rms_norm* norm, const void* dy, const float* rstd, void* dx, float* d_weight,
                        void* scratch, int64_t bytes, int threads) {
  return norm_backward(norm, false, dy, nullptr, rstd, dx, d_weight, scratch, bytes, threads);
}
int pk_add_rms_norm_bwd_cpu(const pk_rms_norm* norm, const void* dy, const void* ds, const float* rstd,
                            void* d_sum, float* d_weight, void* scratch, int64_t bytes, int threads) {
  return norm_backward(norm, true, dy, ds, rstd, d_sum, d_weight, scratch, bytes, threads);
}

}  // extern "C"
#endif
