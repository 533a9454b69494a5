// y = u * scale + bias by columns (DoRA's magnitudes), and its gradients in one read of dy and u.
#pragma once
#include "ops.h"

namespace pk {

struct ScaleColumns {
  const void* u;  // [m, n] of `dtype`, as y
  int dtype;
  int64_t m, n;
  const float* scale;  // [n]
  const float* bias;   // [n], or null
  void* y;
};

struct ScaleColumnsGrad {
  const void* dy;  // [m, n] of `dtype`, as u and du
  const void* u;
  int dtype;
  int64_t m, n;
  const float* scale;       // [n]
  void* du;                 // these three may be null
  float *d_scale, *d_bias;  // [n]
};

}  // namespace pk

#if defined(PK_NS)  // the kernel, compiled once a level
#include "column_sum.h"

namespace PK_NS {

template <typename T>
static void scale_columns_as(const T* u, int64_t m, int64_t n, const float* scale, const float* bias, T* y,
                             int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < m; i++) {
    const T* in = u + i * n;
    T* out = y + i * n;
    int64_t j = 0;
    for (; j + VW <= n; j += VW)
      storex(out + j, fma(loadx(in + j), load(scale + j), bias ? load(bias + j) : vf{}));
    for (; j < n; j++) from_float(to_float(in[j]) * scale[j] + (bias ? bias[j] : 0.0f), out + j);
  }
}

// Eight rows of LANES columns: du, and the sums of dy * u and dy over them. ALL: none of the columns is
// beyond the matrix.
template <bool ALL, typename T>
static inline __attribute__((always_inline)) void scale_columns_grad_tile(const T* dy, const T* u, int64_t ld,
                                                                          int64_t rows, int64_t width,
                                                                          const float* scale, T* du,
                                                                          vf* by_scale, vf* by_bias) {
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
        for (int64_t j = half * VW; j < width && j < (half + 1) * VW; j++)
          from_float(to_float(g[j]) * scale[j], du + i * ld + j);
    }
  }
}

// The sums over rows of dy * u and of dy, LANES columns of them.
struct ScaleSums {
  ColumnSum by_scale, by_bias;
  // ColumnSum::CHAIN rows or the last ones, up to row `end` of m; du (may be null) is written beside.
  template <typename T>
  void add(const T* dy, const T* u, int64_t ld, int64_t rows, int64_t width, const float* scale, T* du,
           int64_t end, int64_t m) {
    vf part[2] = {}, bias[2] = {};
    if (width == LANES) scale_columns_grad_tile<true>(dy, u, ld, rows, width, scale, du, part, bias);
    else scale_columns_grad_tile<false>(dy, u, ld, rows, width, scale, du, part, bias);
    memcpy(by_scale.part, part, sizeof part);
    memcpy(by_bias.part, bias, sizeof bias);
    by_scale.close(end, m, LANES);
    by_bias.close(end, m, LANES);
  }
  // Either may be null.
  void store_sums(int64_t width, float* d_scale, float* d_bias) const {
    if (d_scale) memcpy(d_scale, by_scale.total, (size_t)width * sizeof(float));
    if (d_bias) memcpy(d_bias, by_bias.total, (size_t)width * sizeof(float));
  }
};

// A strip of columns a task, wide enough for whole cache lines of several kilobytes a group of rows.
constexpr int64_t SCALE_STRIP = 8 * LANES;

template <typename T>
static void scale_columns_grad_as(const T* dy, const T* u, int64_t m, int64_t n, const float* scale, T* du,
                                  float* d_scale, float* d_bias, int threads) {
  const int64_t strips = (n + SCALE_STRIP - 1) / SCALE_STRIP;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t strip = 0; strip < strips; strip++) {
    const int64_t from = strip * SCALE_STRIP, all = smaller(SCALE_STRIP, n - from);
    ScaleSums sums[SCALE_STRIP / LANES];
    for (int64_t i = 0; i < m; i += ColumnSum::CHAIN) {
      const int64_t rows = smaller(ColumnSum::CHAIN, m - i);
      for (int64_t q = 0; q < all; q += LANES) {
        const int64_t at = i * n + from + q;
        sums[q / LANES].add(dy + at, u + at, n, rows, smaller(LANES, all - q), scale + from + q,
                            du ? du + at : nullptr, i + rows, m);
      }
    }
    for (int64_t q = 0; q < all; q += LANES)
      sums[q / LANES].store_sums(smaller(LANES, all - q), d_scale ? d_scale + from + q : nullptr,
                                 d_bias ? d_bias + from + q : nullptr);
  }
}

static void scale_columns(const pk::ScaleColumns& a, int threads) {
  by_dtype(a.dtype, [&](auto value) {
    using T = decltype(value);
    scale_columns_as((const T*)a.u, a.m, a.n, a.scale, a.bias, (T*)a.y, threads);
  });
}

static void scale_columns_grad(const pk::ScaleColumnsGrad& a, int threads) {
  by_dtype(a.dtype, [&](auto value) {
    using T = decltype(value);
    scale_columns_grad_as((const T*)a.dy, (const T*)a.u, a.m, a.n, a.scale, (T*)a.du, a.d_scale, a.d_bias,
                          threads);
  });
}

}  // namespace PK_NS

#else  // the C function, compiled once, in dispatch.cpp
#include "entry.h"

namespace pk {

static inline int check_scale(const void* u, int dtype, int64_t m, int64_t n, const float* scale) {
  if (!matrix(m, n)) return PK_ERR_SHAPE;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  return m && n && (!u || !scale) ? PK_ERR_NULL : PK_OK;
}

}  // namespace pk

extern "C" {

int pk_scale_columns_fwd_cpu(const void* u, int dtype, int64_t m, int64_t n, const float* scale,
                             const float* bias, void* y, int threads) {
  if (int bad = check_scale(u, dtype, m, n, scale)) return bad;
  if (m == 0 || n == 0) return PK_OK;
  if (!y) return PK_ERR_NULL;
  current->scale_columns({u, dtype, m, n, scale, bias, y}, threads_or_default(threads));
  return PK_OK;
}
int pk_scale_columns_bwd_cpu(const void* dy, const void* u, int dtype, int64_t m, int64_t n,
                             const float* scale, void* du, float* d_scale, float* d_bias, int threads) {
  if (int bad = check_scale(u, dtype, m, n, scale)) return bad;
  if (n == 0) return PK_OK;
  if (m && !dy) return PK_ERR_NULL;
  current->scale_columns_grad({dy, u, dtype, m, n, scale, du, d_scale, d_bias}, threads_or_default(threads));
  return PK_OK;
}

}  // extern "C"
#endif
