// The ISA's entry points, by dtype, gathered into its row of the dispatcher's table.
#pragma once
#include "ops.h"

#include "gradients_impl.h"
#if defined(PK_AVX512BF16)
#include "tile_backward.h"
#endif
#if defined(PK_AMX)
#include "gemv_tile_impl.h"
#elif defined(PK_AVX512BF16)
#include "gemv_pair_impl.h"
#endif

namespace PK_NS {

// What a product for few rows has in scratch: x in fp32, A, B and the bias where they are not, and room for x
// as the product takes it.
struct FewScratch {
  const float *plain, *a, *b, *bias;
  float* prepared;
};

// xa = drop(x) A^T, by the threads that call it together.
static void few_xa(const FewScratch& s, int64_t m, int64_t k, int64_t r, float* xa) {
#pragma omp for schedule(static)
  for (int64_t j = 0; j < r; j++)
    for (int64_t i = 0; i < m; i++) xa[i * r + j] = dot(s.a + j * k, s.plain + i * k, k);
}

#if defined(PK_AMX)
static void gemv_tiles(const pk::FewRows& of, const FewScratch& s, int threads) {
  const int64_t m = of.m, k = of.w.k, r = of.lora.r, columns = pk::ceil_div(m, 16), steps = k / SIDE;
  bf16* tiles = (bf16*)s.prepared;
  float* low = s.prepared + columns * steps * HALF / 2;
  const TileRows rows = {of.w, m, r, tiles, low, s.b, s.bias};
#pragma omp parallel num_threads(threads)
  {
    tiles_on();
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < columns * steps; i++)
      pack_few((const bf16*)of.x, m, k, i / steps, i % steps, tiles + i * HALF);
    few_xa(s, m, k, r, of.xa);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < columns * r * 16; i++) {
      const int64_t row = i / r / 16 * 16 + i % 16, j = i / 16 % r;
      low[i] = row < m ? of.lora.scaling * of.xa[row * r + j] : 0.0f;
    }
#pragma omp for schedule(static)
    for (int64_t n0 = 0; n0 < of.w.n; n0 += 16) few_task(rows, n0, (bf16*)of.y);
    tiles_off();
  }
}
#elif defined(PK_AVX512BF16)
static void gemv_pairs(const pk::FewRows& of, int threads) {
  const int64_t m = of.m, k = of.w.k, n = of.w.n, ld = pk::gemv_ld(k), r = of.lora.r;
  const Dropout d = make_dropout(of.lora.dropout_threshold, of.lora.seed);
  const bf16* x = (const bf16*)of.x;
  const bool as_bf16 = of.lora.dtype == PK_BF16 && !d.threshold;
  float *plain = of.scratch, *at = plain + m * k;
  const float* a = as_bf16 ? nullptr : as_float(of.lora.lora_a, of.lora.dtype, r * k, at);
  bf16* prepared = (bf16*)(at + pk::round_up(r * (k + n) + n, pk::ALIGN));
  const NestedCode code(of.w.absmax_code);
  const PairRows rows = {of, of.w, code, ld, prepared};
  const int64_t most = pk::ceil_div(m, pk::ceil_div(m, (int64_t)MOST_PAIR_ROWS));  // of x at a time
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m; i++) {
      const int64_t place = i % most, first = i - place, together = smaller(most, m - first);
      prepare_pairs(x + i * k, k, together * WIDE, prepared + first * ld + place * WIDE);
      if (r && d.threshold) apply_dropout(d, x + i * k, k, i, 0, 1, k, plain + i * k, k);
      else if (r && !as_bf16) convert(x + i * k, k, plain + i * k);
    }
#pragma omp for schedule(static)
    for (int64_t j = 0; j < r; j++)
      for (int64_t i = 0; i < m; i++)
        of.xa[i * r + j] = as_bf16 ? dot((const bf16*)of.lora.lora_a + j * k, x + i * k, k)
                                   : dot(a + j * k, plain + i * k, k);
    TaskScales scales;
#pragma omp for schedule(static)
    for (int64_t n0 = 0; n0 < n; n0 += PAIR_TASK)
      for (int64_t i = 0; i < m; i += most)
        pair_task_of<MOST_PAIR_ROWS>(smaller(most, m - i), rows, n0, i, scales);
  }
}
#endif

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
  float *plain = of.scratch, *at = plain + m * k;
  const FewScratch s{plain, as_float(lora.lora_a, lora.dtype, r * k, at),
                     as_float(lora.lora_b, lora.dtype, r * n, at + r * k),
                     as_float(of.bias, of.bias_dtype, n, at + r * (k + n)),
                     at + pk::round_up(r * (k + n) + n, pk::ALIGN)};
  const Dropout d = make_dropout(lora.dropout_threshold, lora.seed);
  for (int64_t i = 0; r && i < m; i++) {
    if (d.threshold) apply_dropout(d, x + i * k, k, i, 0, 1, k, plain + i * k, k);
    else convert(x + i * k, k, plain + i * k);
  }
#if defined(PK_AMX)
  if (of.dtype == PK_BF16 && gemv_tiles_take(w, m)) return gemv_tiles(of, s, threads);
#endif
  const Table table = w.code ? make_table(w.code) : Table{};
  for (int64_t i = 0; i < m; i++) prepare_x(x + i * k, k, gemv_grouped(w), s.prepared + i * ld);
#pragma omp parallel num_threads(threads)
  {
    few_xa(s, m, k, r, xa);
#pragma omp for schedule(static)
    for (int64_t n0 = 0; n0 < n; n0 += TASK_ROWS)
      for (int64_t i = 0; i < m; i += MAX_ROWS) {
        const int64_t count = smaller(MAX_ROWS, m - i), rows = smaller(TASK_ROWS, n - n0);
        const float* xs[MAX_ROWS];
        float out[TASK_ROWS][MAX_ROWS];
        for (int64_t q = 0; q < count; q++) xs[q] = s.prepared + (i + q) * ld;
        gemv_task_of<MAX_ROWS>((int)count, w, table, n0, rows, xs, out);
        for (int64_t row = n0; row < n0 + rows; row++)
          for (int64_t q = 0; q < count; q++) {
            float v = out[row - n0][q] + (s.bias ? s.bias[row] : 0.0f);
            if (r) v += lora.scaling * dot(xa + (i + q) * r, s.b + row * r, r);
            from_float(v, &y[(i + q) * n + row]);
          }
      }
  }
}

static void gemv(const pk::FewRows& of, int threads) {
#if defined(PK_AVX512BF16) && !defined(PK_AMX)
  if (of.dtype == PK_BF16 && gemv_pairs_take(of.w)) return gemv_pairs(of, threads);
#endif
  by_dtype(of.dtype, [&](auto value) { gemv_as<decltype(value)>(of, threads); });
}

static void forward(const pk::Forward& of, int threads) {
  const pk::Group& g = of.group;
#if defined(PK_AVX512BF16)
  if (of.dtype == PK_BF16 && pk::tiles_take(g))
    return forward_tiles(g, (const bf16*)of.x, of.m, of.scratch, threads);
#endif
  const pk::Plan p = g.forward_plan(of.m, LANES, threads);
  by_dtype(of.dtype,
           [&](auto value) { forward_gemm(p, g, (const decltype(value)*)of.x, of.m, of.scratch, threads); });
}

static void backward(const pk::Backward& of, int threads) {
  const pk::Group& g = of.group;
#if defined(PK_AVX512BF16)
  if (of.dx && of.dtype == PK_BF16 && pk::tiles_take(g))
    return backward_tiles(g, (const bf16*)of.x, of.m, (bf16*)of.dx, of.scratch, threads);
#endif
  const pk::Plan p = g.backward_plan(of.m, of.dx != nullptr, LANES, threads);
  by_dtype(of.dtype, [&](auto value) {
    using T = decltype(value);
    backward_all(p, g, (const T*)of.x, of.m, (T*)of.dx, of.scratch, threads);
  });
}

static void dropout_mask(const pk::DropoutMask& of, int threads) {
  const Dropout d = make_dropout(of.threshold, of.seed);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < of.m; i++) dropout_row(d, i, 0, of.k, of.mask + i * of.k);
}

}  // namespace PK_NS

#if defined(PK_AVX512BF16)
#define PK_TILES true
#else
#define PK_TILES false
#endif
#define PK_ENTRY(kernel, Operands) PK_NS::kernel,
#define PK_KERNELS(isa_name) {isa_name, PK_NS::LANES, PK_TILES, PK_EACH_KERNEL(PK_ENTRY)}
