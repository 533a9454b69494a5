// Gated linear units, h = act(gate) * up, and their backward: one pass over the operands, fp32 inside, one rounding.
#pragma once
#include "kernels.h"
#include "math_impl.h"

namespace PK_NS {

// act(g) and act'(g). The tanh form of gelu is g * sigmoid(2 z) with z = sqrt(2 / pi) (g + 0.044715 g^3), since 1 + tanh(z) = 2 sigmoid(2 z).
template <int ACTIVATION>
static inline __attribute__((always_inline)) void activate(vf g, vf& value, vf& slope) {
  if constexpr (ACTIVATION == PK_SILU) {
    vf s, rest;
    times_sigmoid(g, g, value, s, rest);
    slope = fma(value, rest, s);
  } else if constexpr (ACTIVATION == PK_GELU) {
    vf below, density;
    normal(g, below, density);
    value = g * below;
    slope = fma(g, density, below);
  } else {
    // Beyond 15 the sigmoid is 0 or 1 to fp32 (its argument is 265), and g^2 cannot overflow.
    const vf a = absolute(g), bounded = select(a > set1(15.0f), set1(15.0f), a);
    const vf square = bounded * bounded, signed_bounded = select(g < vf{}, -bounded, bounded);
    vf s, rest;
    times_sigmoid(g, signed_bounded * fma(square, set1(0.0713548162726f), set1(1.5957691216057f)), value, s, rest);
    slope = fma(value * rest, fma(square, set1(0.2140644488178f), set1(1.5957691216057f)), s);
  }
}

constexpr int64_t GLU_COLUMNS = 2048;      // of a task. Not measured.
constexpr int64_t GLU_PARALLEL = 1 << 14;  // elements from which a parallel region pays. Not measured.

template <int ACTIVATION, typename T>
static void glu_forward_of(const pk_glu& a, int64_t m, int64_t n, T* h, int threads) {
  const int64_t pieces = (n + GLU_COLUMNS - 1) / GLU_COLUMNS;
#pragma omp parallel for schedule(static) num_threads(threads) if (m * n >= GLU_PARALLEL)
  for (int64_t task = 0; task < m * pieces; task++) {
    const int64_t row = task / pieces, start = task % pieces * GLU_COLUMNS, stop = start + GLU_COLUMNS < n ? start + GLU_COLUMNS : n;
    const T *gate = (const T*)a.gate + row * a.ld_gate, *up = (const T*)a.up + row * a.ld_up;
    for (int64_t i = start; i < stop; i += VW) {
      vf value, slope;
      activate<ACTIVATION>(load_some(gate + i, stop - i), value, slope);
      store_some(h + row * n + i, value * load_some(up + i, stop - i), stop - i);
    }
  }
}

template <int ACTIVATION, typename T>
static void glu_backward_of(const pk_glu& a, const pk_glu_grad& d, int64_t m, int64_t n, const T* dy, T* h, int threads) {
  const int64_t pieces = (n + GLU_COLUMNS - 1) / GLU_COLUMNS;
#pragma omp parallel for schedule(static) num_threads(threads) if (m * n >= GLU_PARALLEL)
  for (int64_t task = 0; task < m * pieces; task++) {
    const int64_t row = task / pieces, start = task % pieces * GLU_COLUMNS, stop = start + GLU_COLUMNS < n ? start + GLU_COLUMNS : n;
    const T *gate = (const T*)a.gate + row * a.ld_gate, *up = (const T*)a.up + row * a.ld_up;
    T *d_gate = (T*)d.d_gate + row * d.ld_d_gate, *d_up = (T*)d.d_up + row * d.ld_d_up;
    for (int64_t i = start; i < stop; i += VW) {
      const int64_t count = stop - i;
      vf value, slope;
      activate<ACTIVATION>(load_some(gate + i, count), value, slope);
      const vf u = load_some(up + i, count), g = load_some(dy + row * n + i, count);
      store_some(d_gate + i, g * u * slope, count);
      store_some(d_up + i, g * value, count);
      if (h) store_some(h + row * n + i, value * u, count);
    }
  }
}

template <typename T>
static void glu_of(const pk_glu& a, const pk_glu_grad* d, int64_t m, int64_t n, int activation, const T* dy, T* h, int threads) {
  if (d && activation == PK_SILU) glu_backward_of<PK_SILU>(a, *d, m, n, dy, h, threads);
  else if (d && activation == PK_GELU) glu_backward_of<PK_GELU>(a, *d, m, n, dy, h, threads);
  else if (d) glu_backward_of<PK_GELU_TANH>(a, *d, m, n, dy, h, threads);
  else if (activation == PK_SILU) glu_forward_of<PK_SILU>(a, m, n, h, threads);
  else if (activation == PK_GELU) glu_forward_of<PK_GELU>(a, m, n, h, threads);
  else glu_forward_of<PK_GELU_TANH>(a, m, n, h, threads);
}

static void glu(const pk_glu& a, const pk_glu_grad* d, int dtype, int64_t m, int64_t n, int activation, const void* dy, void* h, int threads) {
  if (dtype == PK_F32) glu_of(a, d, m, n, activation, (const float*)dy, (float*)h, threads);
  else if (dtype == PK_BF16) glu_of(a, d, m, n, activation, (const bf16*)dy, (bf16*)h, threads);
  else glu_of(a, d, m, n, activation, (const f16*)dy, (f16*)h, threads);
}

}  // namespace PK_NS
