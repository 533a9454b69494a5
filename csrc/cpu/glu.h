// Gated linear units, h = act(gate) * up, and their backward: one pass over the operands, fp32 inside, one
// rounding.
#pragma once
#include "ops.h"

namespace pk {

struct Glu {
  const pk_glu& operands;
  const pk_glu_grad* grads;  // null: forward
  int dtype;
  int64_t m, n;
  int activation;
  const void* dy;  // [m, n] of `dtype`, as h; backward h may be null
  void* h;
};

}  // namespace pk

#if defined(PK_NS)  // the kernel, compiled once a level
#include "math_impl.h"

namespace PK_NS {

// act(g) and act'(g). The tanh form of gelu is g * sigmoid(2 z) with z = sqrt(2 / pi) (g + 0.044715 g^3),
// since 1 + tanh(z) = 2 sigmoid(2 z).
template <int ACTIVATION, bool FINE, typename V>
static inline __attribute__((always_inline)) void activate(V g, V& value, V& slope) {
  if constexpr (ACTIVATION == PK_SILU) {
    V s, rest;
    times_sigmoid<FINE>(g, g, value, s, rest);
    slope = fma(value, rest, s);
  } else if constexpr (ACTIVATION == PK_GELU) {
    V below, density;
    normal<FINE>(g, below, density);
    value = g * below;
    slope = fma(g, density, below);
  } else {
    // Beyond 15 the sigmoid is 0 or 1 to fp32 (its argument is 265), and g^2 cannot overflow.
    const V bounded = at_least(at_most(g, 15.0f), -15.0f), square = bounded * bounded;
    const V cubic = fma(square, constant<V>(0.0713548162726f), constant<V>(1.5957691216057f));
    V s, rest;
    times_sigmoid<FINE>(g, bounded * cubic, value, s, rest);
    slope = fma(value * rest, fma(square, constant<V>(0.2140644488178f), constant<V>(1.5957691216057f)), s);
  }
}

constexpr int64_t GLU_COLUMNS = 2048;      // of a task. Not measured.
constexpr int64_t GLU_PARALLEL = 1 << 14;  // elements from which a parallel region pays. Not measured.

// `part(begin, end)` for the pieces of m rows of n columns: elements [begin, end) of row `row`.
template <typename F>
static void for_each_piece(int64_t m, int64_t n, int threads, F part) {
  const int64_t pieces = (n + GLU_COLUMNS - 1) / GLU_COLUMNS;
#pragma omp parallel for schedule(static) num_threads(threads) if (m * n >= GLU_PARALLEL)
  for (int64_t task = 0; task < m * pieces; task++) {
    const int64_t start = task % pieces * GLU_COLUMNS;
    part(task / pieces, start, start + GLU_COLUMNS < n ? start + GLU_COLUMNS : n);
  }
}

// Vectors side by side. 16 elements of bf16 in the first-level cache took 3.1 ns forward and 4.5 backward
// with two, 2.7 and 3.7 with four, 2.6 and 3.3 with eight (silu, Zen 5); fp32's longer polynomials have
// registers for four, levels of 16 registers for two.
#if defined(PK_AVX512)
template <bool FINE>
using GluVectors = std::conditional_t<FINE, vf4, vf8>;
#else
template <bool>
using GluVectors = vf2;
#endif

// h = act(gate) * up.
template <int ACTIVATION, typename T>
static void glu_forward_of(const pk_glu& a, int64_t m, int64_t n, T* h, int threads) {
  constexpr bool FINE = sizeof(T) == 4;
  for_each_piece(m, n, threads, [&](int64_t row, int64_t start, int64_t stop) {
    const T *gate = (const T*)a.gate + row * a.ld_gate, *up = (const T*)a.up + row * a.ld_up;
    T* out = h + row * n;
    by_vectors<GluVectors<FINE>>(start, stop, [&](int64_t i, auto some) {
      const auto g = some.load(gate + i);
      std::remove_const_t<decltype(g)> value, slope;
      activate<ACTIVATION, FINE>(g, value, slope);
      some.store(out + i, value * some.load(up + i));
    });
  });
}

template <int ACTIVATION, typename T>
static void glu_backward_of(const pk_glu& a, const pk_glu_grad& d, int64_t m, int64_t n, const T* dy, T* h,
                            int threads) {
  constexpr bool FINE = sizeof(T) == 4;
  for_each_piece(m, n, threads, [&](int64_t row, int64_t start, int64_t stop) {
    const T *gate = (const T*)a.gate + row * a.ld_gate, *up = (const T*)a.up + row * a.ld_up,
            *grad = dy + row * n;
    T *d_gate = (T*)d.d_gate + row * d.ld_d_gate, *d_up = (T*)d.d_up + row * d.ld_d_up;
    by_vectors<GluVectors<FINE>>(start, stop, [&](int64_t i, auto some) {
      auto g = some.load(gate + i), u = g, value = g, slope = g;
      activate<ACTIVATION, FINE>(g, value, slope);
      u = some.load(up + i), g = some.load(grad + i);
      some.store(d_gate + i, g * u * slope);
      some.store(d_up + i, g * value);
      if (h) some.store(h + row * n + i, value * u);
    });
  });
}

template <typename T>
static void glu_of(const pk::Glu& of, int threads) {
  const pk_glu& a = of.operands;
  const pk_glu_grad* d = of.grads;
  const T* dy = (const T*)of.dy;
  T* h = (T*)of.h;
  if (d && of.activation == PK_SILU) glu_backward_of<PK_SILU>(a, *d, of.m, of.n, dy, h, threads);
  else if (d && of.activation == PK_GELU) glu_backward_of<PK_GELU>(a, *d, of.m, of.n, dy, h, threads);
  else if (d) glu_backward_of<PK_GELU_TANH>(a, *d, of.m, of.n, dy, h, threads);
  else if (of.activation == PK_SILU) glu_forward_of<PK_SILU>(a, of.m, of.n, h, threads);
  else if (of.activation == PK_GELU) glu_forward_of<PK_GELU>(a, of.m, of.n, h, threads);
  else glu_forward_of<PK_GELU_TANH>(a, of.m, of.n, h, threads);
}

static void glu(const pk::Glu& of, int threads) {
  by_dtype(of.dtype, [&](auto value) { glu_of<decltype(value)>(of, threads); });
}

}  // namespace PK_NS

#else  // the C function, compiled once, in dispatch.cpp
#include "entry.h"

namespace pk {

static inline int check_glu(const pk_glu* a, const pk_glu_grad* d, int dtype, int64_t m, int64_t n,
                            int activation) {
  if (!a) return PK_ERR_NULL;
  if (!matrix(m, n) || activation < PK_SILU || activation > PK_GELU_TANH) return PK_ERR_SHAPE;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  if (m == 0 || n == 0) return PK_OK;
  if (!a->gate || !a->up || (d && (!d->d_gate || !d->d_up))) return PK_ERR_NULL;
  const bool apart = rows_apart(m, n, a->ld_gate) && rows_apart(m, n, a->ld_up);
  return apart && (!d || (rows_apart(m, n, d->ld_d_gate) && rows_apart(m, n, d->ld_d_up))) ? PK_OK
                                                                                           : PK_ERR_SHAPE;
}

}  // namespace pk

extern "C" {

static int glu_status(const pk_glu* a, const pk_glu_grad* d, int dtype, int64_t m, int64_t n, int activation,
                      const void* dy, void* h, int threads) {
  if (int bad = check_glu(a, d, dtype, m, n, activation)) return bad;
  if (m == 0 || n == 0) return PK_OK;
  if (d ? !dy : !h) return PK_ERR_NULL;
  current->glu({*a, d, dtype, m, n, activation, dy, h}, threads_or_default(threads));
  return PK_OK;
}
int pk_glu_fwd_cpu(const pk_glu* operands, int dtype, int64_t m, int64_t n, int activation, void* h,
                   int threads) {
  return glu_status(operands, nullptr, dtype, m, n, activation, nullptr, h, threads);
}
int pk_glu_bwd_cpu(const pk_glu* operands, const pk_glu_grad* grads, int dtype, int64_t m, int64_t n,
                   int activation, const void* dy, void* h, int threads) {
  return grads ? glu_status(operands, grads, dtype, m, n, activation, dy, h, threads) : PK_ERR_NULL;
}

}  // extern "C"
#endif
