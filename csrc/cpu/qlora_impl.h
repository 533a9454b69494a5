// The QLoRA linear on the CPU, both directions, from the engine's pieces. See docs/kernels.md for the maths and the order of passes.
#pragma once
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "gemm_impl.h"
#include "gemv_impl.h"
#include "philox.h"
#include "plan.h"

namespace PK_NS {

static inline int thread_id() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Scratch of one call, laid out by pk::Plan.
struct Scratch {
  const pk::Plan& plan;
  float* base;
  float* pack(int64_t panel) const { return base + plan.pack_at + panel * LANES * plan.contraction; }
  float* low_rank(int64_t panel, int64_t r) const { return base + plan.low_rank_at + panel * LANES * r; }
  float* lora_a() const { return base + plan.lora_a_at; }
  float* lora_b() const { return base + plan.lora_b_at; }
  float* bias() const { return base + plan.bias_at; }
  float* own() const { return base + plan.own_at + thread_id() * plan.own_size; }
  float* own_decoded() const { return own(); }
  float* own_c() const { return own() + plan.decoded_size; }
  float* own_tmp() const { return own() + plan.decoded_size + plan.c_size; }
};

static const float* as_float(const void* p, int dtype, int64_t count, float* out) {
  if (!p || dtype == PK_F32) return (const float*)p;
  if (dtype == PK_BF16) convert((const bf16*)p, count, out);
  else convert((const f16*)p, count, out);
  return out;
}

static inline void clear(float* p, int64_t count) { memset(p, 0, (size_t)count * sizeof(float)); }

// One panel of src [rows][cols] -> packed [cols][LANES] (may be null) and low[row][LANES] = V src^T for the r rows of V; dropped if `d`.
template <typename T>
static void pack_and_project(const Scratch& s, const T* src, int64_t row, int64_t rows, int64_t cols, const Dropout* d, Rows v, int64_t r, float* packed,
                             float* low) {
  float* tmp = s.own_tmp();
  clear(low, r * LANES);
  for (int64_t from = 0; from < cols; from += pk::KC) {
    int64_t count = smaller(pk::KC, cols - from);
    const T* at = src + row * cols + from;
    float* chunk = packed ? packed + from * LANES : tmp;
    if (packed || !d) pack_transposed(at, cols, rows, count, chunk);
    if (!r) continue;
    if (d) {
      float* masked = tmp + pk::KC * LANES;
      apply_dropout(*d, at, cols, row, from, rows, count, masked, pk::KC);
      pack_transposed(masked, pk::KC, rows, count, tmp);
      chunk = tmp;
    }
    multiply({v.p + from * v.c_stride, v.row_stride, v.c_stride}, r, chunk, count, low, LANES, LOW_RANK_CHAIN);
  }
}

// y = x W^T + scaling * xa B^T + bias, by blocks of rows of x; w == nullptr leaves out the base product and adds to y.
template <typename T>
static void forward_gemm(const pk::Plan& plan, const pk_weight* w, const pk_lora& lora, const T* x, int64_t m, int64_t n, int64_t k, const void* bias,
                         int bias_dtype, T* y, float* xa, float* scratch, int threads) {
  const Scratch s{plan, scratch};
  const int64_t r = lora.r;
  const float* a = as_float(lora.lora_a, lora.dtype, r * k, s.lora_a());
  const float* b = as_float(lora.lora_b, lora.dtype, r * n, s.lora_b());
  const float* add = as_float(bias, bias_dtype, n, s.bias());
  const Dropout dropout = make_dropout(lora.dropout_threshold, lora.seed);
  const Dropout* d = dropout.threshold ? &dropout : nullptr;
  const Table table = w && w->code ? make_table(w->code) : Table{};
  const int64_t blocks = (n + plan.block - 1) / plan.block;
  for (int64_t m0 = 0; m0 < m; m0 += plan.mc) {
    const int64_t rows = smaller(plan.mc, m - m0), panels = (rows + LANES - 1) / LANES;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t p = 0; p < panels; p++) {
      const int64_t row = m0 + p * LANES, count = smaller(LANES, m - row);
      float* low = s.low_rank(p, r);
      pack_and_project(s, x, row, count, k, d, {a, k, 1}, r, w ? s.pack(p) : nullptr, low);
      if (!r) continue;
      store_transposed(low, LANES, r, count, nullptr, xa + row * r, r, false);
      for (int64_t i = 0; i < r * LANES; i++) low[i] *= lora.scaling;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t n0 = block * plan.block, size = smaller(plan.block, n - n0);
      float *c = s.own_c(), *decoded = s.own_decoded();
      clear(c, size * plan.mc);
      for (int64_t from = 0; w && from < k; from += pk::KC) {
        const int64_t count = smaller(pk::KC, k - from);
        decode_pieces(*w, table, n0, size, from, count, decoded, pk::LD_FWD);
        for (int64_t p = 0; p < panels; p++)
          multiply({decoded, pk::LD_FWD, 1}, size, s.pack(p) + from * LANES, count, c + p * LANES, plan.mc);
      }
      for (int64_t p = 0; p < panels; p++) {
        const int64_t row = m0 + p * LANES;
        if (r) multiply({b + n0 * r, r, 1}, size, s.low_rank(p, r), r, c + p * LANES, plan.mc, LOW_RANK_CHAIN);
        store_transposed(c + p * LANES, plan.mc, size, smaller(LANES, m - row), add ? add + n0 : nullptr, y + row * n + n0, n, !w);
      }
    }
  }
}

// dx tile of one panel where the low-rank part is masked: dx = c^T + mask * low_c^T.
template <typename T>
static void store_dropped(const Dropout& d, const float* c, int64_t ldc, const float* low, int64_t size, int64_t row, int64_t k0, int64_t lanes, float* tmp,
                          T* dx, int64_t ld, bool accumulate) {
  float *plain = tmp, *masked = tmp + LANES * size;
  store_transposed(low, LANES, size, lanes, nullptr, plain, size, false);
  apply_dropout(d, plain, size, row, k0, lanes, size, masked, size);
  store_transposed(c, ldc, size, lanes, nullptr, masked, size, true);
  for (int64_t l = 0; l < lanes; l++)
    for (int64_t j = 0; j < size; j++) from_float(masked[l * size + j] + (accumulate ? to_float(dx[l * ld + j]) : 0.0f), &dx[l * ld + j]);
}

// dyb = scaling * dy B and, where dx is wanted, dx = dy W + drop(dyb A); w == nullptr: dx += drop(dyb A).
template <typename T>
static void backward_dx(const pk::Plan& plan, const pk_weight* w, const pk_lora& lora, const T* dy, int64_t m, int64_t n, int64_t k, float* dyb, T* dx,
                        float* scratch, int threads) {
  const Scratch s{plan, scratch};
  const int64_t r = lora.r;
  const float* a = as_float(lora.lora_a, lora.dtype, r * k, s.lora_a());
  const float* b = as_float(lora.lora_b, lora.dtype, r * n, s.lora_b());
  const Dropout dropout = make_dropout(lora.dropout_threshold, lora.seed);
  const bool drop = dropout.threshold && r;
  const Table table = w && w->code ? make_table(w->code) : Table{};
  const int64_t blocks = dx ? (k + plan.block - 1) / plan.block : 0;
  const bool base = w && dx;
  for (int64_t m0 = 0; m0 < m; m0 += plan.mc) {
    const int64_t rows = smaller(plan.mc, m - m0), panels = (rows + LANES - 1) / LANES;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t p = 0; p < panels; p++) {
      const int64_t row = m0 + p * LANES, count = smaller(LANES, m - row);
      float* low = s.low_rank(p, r);
      pack_and_project(s, dy, row, count, n, nullptr, {b, 1, r}, r, base ? s.pack(p) : nullptr, low);
      for (int64_t i = 0; i < r * LANES; i++) low[i] *= lora.scaling;
      if (r) store_transposed(low, LANES, r, count, nullptr, dyb + row * r, r, false);
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t k0 = block * plan.block, size = smaller(plan.block, k - k0), ld = plan.block + pk::PAD;
      float *c = s.own_c(), *decoded = s.own_decoded(), *tmp = s.own_tmp();
      clear(c, size * plan.mc);
      for (int64_t from = 0; base && from < n; from += pk::KC) {
        const int64_t count = smaller(pk::KC, n - from);
        decode_pieces(*w, table, from, count, k0, size, decoded, ld);
        for (int64_t p = 0; p < panels; p++) multiply({decoded, 1, ld}, size, s.pack(p) + from * LANES, count, c + p * LANES, plan.mc);
      }
      for (int64_t p = 0; p < panels; p++) {
        const int64_t row = m0 + p * LANES, lanes = smaller(LANES, m - row);
        T* out = dx + row * k + k0;
        if (drop) {
          clear(tmp, size * LANES);
          multiply({a + k0, 1, k}, size, s.low_rank(p, r), r, tmp, LANES, LOW_RANK_CHAIN);
          store_dropped(dropout, c + p * LANES, plan.mc, tmp, size, row, k0, lanes, tmp + size * LANES, out, k, !w);
          continue;
        }
        if (r) multiply({a + k0, 1, k}, size, s.low_rank(p, r), r, c + p * LANES, plan.mc, LOW_RANK_CHAIN);
        store_transposed(c + p * LANES, plan.mc, size, lanes, nullptr, out, k, !w);
      }
    }
  }
}

// The weight gradients' product: low [m, r] and src [m, cols] -> scale * low^T src, stored [r, cols], or [cols, r] where `transposed`.
template <typename T, typename G>
static void low_rank_gradient(const pk::Plan& plan, const float* low, int64_t r, const T* src, int64_t m, int64_t cols, const Dropout* d, float scale,
                              bool transposed, G* out, float* scratch, int threads) {
  const Scratch s{plan, scratch};
  constexpr int64_t STRIP = pk::STRIP_PANELS * LANES;
  const int64_t strips = (cols + STRIP - 1) / STRIP;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t strip = 0; strip < strips; strip++) {
    const int64_t c0 = strip * STRIP, width = smaller(STRIP, cols - c0);
    float *c = s.own(), *buffer = c + r * STRIP, *masked = buffer + pk::KC * LANES;
    clear(c, r * STRIP);
    for (int64_t m0 = 0; m0 < m; m0 += pk::KC) {
      const int64_t count = smaller(pk::KC, m - m0);
      if (d) apply_dropout(*d, src + m0 * cols + c0, cols, m0, c0, count, width, masked, STRIP);
      for (int64_t q = 0; q < width; q += LANES) {
        if (d) pack_rows(masked + q, STRIP, count, width - q, buffer);
        else pack_rows(src + m0 * cols + c0 + q, cols, count, width - q, buffer);
        multiply({low + m0 * r, 1, r}, r, buffer, count, c + q, STRIP, LOW_RANK_CHAIN);
      }
    }
    if (!transposed) {
      store_rows(c, STRIP, r, width, scale, out + c0, cols);
      continue;
    }
    for (int64_t i = 0; i < r * STRIP; i++) c[i] *= scale;
    for (int64_t q = 0; q < width; q += LANES) store_transposed(c + q, STRIP, r, smaller(LANES, width - q), nullptr, out + (c0 + q) * r, r, false);
  }
}

template <typename T>
static void low_rank_gradient_as(int dtype, const pk::Plan& plan, const float* low, int64_t r, const T* src, int64_t m, int64_t cols, const Dropout* d,
                                 float scale, bool transposed, void* out, float* scratch, int threads) {
  if (dtype == PK_F32) low_rank_gradient(plan, low, r, src, m, cols, d, scale, transposed, (float*)out, scratch, threads);
  else if (dtype == PK_BF16) low_rank_gradient(plan, low, r, src, m, cols, d, scale, transposed, (bf16*)out, scratch, threads);
  else low_rank_gradient(plan, low, r, src, m, cols, d, scale, transposed, (f16*)out, scratch, threads);
}

template <typename T>
static void column_sums(const T* dy, int64_t m, int64_t n, float* out, int threads) {
  const int64_t strips = (n + LANES - 1) / LANES;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t strip = 0; strip < strips; strip++) {
    const int64_t from = strip * LANES, width = smaller(LANES, n - from);
    // Three levels of short chains (8 rows, 16 of those, all of those): one chain over thousands of rows would lose digits.
    constexpr int64_t CHAIN = 8, MIDDLE = 128;
    float total[LANES] = {}, middle[LANES] = {};
    for (int64_t i0 = 0; i0 < m; i0 += CHAIN) {
      const int64_t end = smaller(i0 + CHAIN, m);
      float part[LANES] = {};
      for (int64_t i = i0; i < end; i++)
        for (int64_t j = 0; j < width; j++) part[j] += to_float(dy[i * n + from + j]);
      const bool last = end % MIDDLE == 0 || end == m;
      for (int64_t j = 0; j < width; j++) {
        middle[j] += part[j];
        if (!last) continue;
        total[j] += middle[j];
        middle[j] = 0;
      }
    }
    memcpy(out + from, total, (size_t)width * 4);
  }
}

template <typename T>
static void backward_all(const pk::Plan& plan, const pk_weight* w, const pk_lora& lora, const T* dy, const T* x, int64_t m, int64_t n, int64_t k,
                         const float* xa, float* dyb, T* dx, void* d_a, void* d_b, float* d_bias, float* scratch, int threads) {
  const Dropout dropout = make_dropout(lora.dropout_threshold, lora.seed);
  if (dx || d_a) backward_dx(plan, w, lora, dy, m, n, k, dyb, dx, scratch, threads);
  if (d_a)
    low_rank_gradient_as(lora.dtype, plan, dyb, lora.r, x, m, k, dropout.threshold ? &dropout : nullptr, 1.0f, false, d_a, scratch, threads);
  if (d_b) low_rank_gradient_as(lora.dtype, plan, xa, lora.r, dy, m, n, nullptr, lora.scaling, true, d_b, scratch, threads);
  if (d_bias) column_sums(dy, m, n, d_bias, threads);
}

}  // namespace PK_NS
