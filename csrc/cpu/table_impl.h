// The ISA's entry points, by dtype, gathered into its row of the dispatcher's table.
#pragma once
#include "cross_entropy_impl.h"
#include "glu_impl.h"
#include "gradients_impl.h"
#include "kernels.h"
#include "norm_impl.h"
#include "quantize_impl.h"
#include "rope_impl.h"
#include "scale_impl.h"
#include "squares_impl.h"
#if defined(PK_AVX512BF16)
#include "tile_impl.h"
#endif

namespace PK_NS {

// y = x W^T + scaling * (x A^T) B^T + bias for few rows: x prepared once, MAX_ROWS rows share a decode,
// TASK_ROWS rows of W are a task.
template <typename T>
static void gemv_as(const pk::FewRows& of, int threads) {
  const pk_weight& w = of.w;
  const pk_lora& lora = of.lora;
  const T* x = (const T*)of.x;
  T* y = (T*)of.y;
  float* xa = of.xa;
  const int64_t m = of.m, n = w.n, k = w.k, r = lora.r, ld = pk::gemv_ld(k);
  float *plain = of.scratch, *prepared = plain + m * k, *at = prepared + m * ld;
  const Table table = w.code ? make_table(w.code) : Table{};
  const bool grouped = gemv_grouped(w);
  const float* a = as_float(lora.lora_a, lora.dtype, r * k, at);
  const float* b = as_float(lora.lora_b, lora.dtype, r * n, at + r * k);
  const float* add = as_float(of.bias, of.bias_dtype, n, at + r * (k + n));
  const Dropout d = make_dropout(lora.dropout_threshold, lora.seed);
  for (int64_t i = 0; i < m; i++) {
    prepare_x(x + i * k, k, grouped, prepared + i * ld);
    if (!r) continue;
    if (d.threshold) apply_dropout(d, x + i * k, k, i, 0, 1, k, plain + i * k, k);
    else convert(x + i * k, k, plain + i * k);
  }
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t j = 0; j < r; j++)
      for (int64_t i = 0; i < m; i++) xa[i * r + j] = dot(a + j * k, plain + i * k, k);
#pragma omp for schedule(static)
    for (int64_t n0 = 0; n0 < n; n0 += TASK_ROWS)
      for (int64_t i = 0; i < m; i += MAX_ROWS) {
        const int64_t count = smaller(MAX_ROWS, m - i), rows = smaller(TASK_ROWS, n - n0);
        const float* xs[MAX_ROWS];
        float out[TASK_ROWS][MAX_ROWS];
        for (int64_t q = 0; q < count; q++) xs[q] = prepared + (i + q) * ld;
        gemv_task_of<MAX_ROWS>((int)count, w, table, n0, rows, xs, out);
        for (int64_t row = n0; row < n0 + rows; row++)
          for (int64_t q = 0; q < count; q++) {
            float v = out[row - n0][q] + (add ? add[row] : 0.0f);
            if (r) v += lora.scaling * dot(xa + (i + q) * r, b + row * r, r);
            from_float(v, &y[(i + q) * n + row]);
          }
      }
  }
}

static void gemv(const pk::FewRows& of, int threads) {
  by_dtype(of.dtype, [&](auto value) { gemv_as<decltype(value)>(of, threads); });
}

static void forward(const pk::Group& g, const void* x, int dtype, int64_t m, float* scratch, int threads) {
#if defined(PK_AVX512BF16)
  if (dtype == PK_BF16 && pk::tiles_take(g)) return forward_tiles(g, (const bf16*)x, m, scratch, threads);
#endif
  const pk::Plan p = g.forward_plan(m, LANES, threads);
  by_dtype(dtype, [&](auto value) { forward_gemm(p, g, (const decltype(value)*)x, m, scratch, threads); });
}

static void backward(const pk::Group& g, const void* x, int dtype, int64_t m, void* dx, float* scratch,
                     int threads) {
#if defined(PK_AVX512BF16)
  if (dx && dtype == PK_BF16 && pk::tiles_take(g))
    return backward_tiles(g, (const bf16*)x, m, (bf16*)dx, scratch, threads);
#endif
  const pk::Plan p = g.backward_plan(m, dx != nullptr, LANES, threads);
  by_dtype(dtype, [&](auto value) {
    using T = decltype(value);
    backward_all(p, g, (const T*)x, m, (T*)dx, scratch, threads);
  });
}

static void dropout_mask(int64_t m, int64_t k, uint32_t threshold, uint64_t seed, float* mask, int threads) {
  const Dropout d = make_dropout(threshold, seed);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < m; i++) dropout_row(d, i, 0, k, mask + i * k);
}

}  // namespace PK_NS

#if defined(PK_AVX512BF16)
#define PK_TILES true
#else
#define PK_TILES false
#endif
#define PK_KERNELS(isa_name)  \
  {isa_name,                  \
   PK_NS::LANES,              \
   PK_TILES,                  \
   PK_NS::quantize,           \
   PK_NS::quantize_absmax,    \
   PK_NS::dequantize,         \
   PK_NS::gemv,               \
   PK_NS::forward,            \
   PK_NS::backward,           \
   PK_NS::dropout_mask,       \
   PK_NS::glu,                \
   PK_NS::rms_norm,           \
   PK_NS::rms_norm_grad,      \
   PK_NS::rope,               \
   PK_NS::cross_entropy,      \
   PK_NS::scale_columns,      \
   PK_NS::scale_columns_grad, \
   PK_NS::dora_norm,          \
   PK_NS::row_squares}
