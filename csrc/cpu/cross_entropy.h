// Cross-entropy over a block of rows of logits, and its gradient in their place: one read for the maximum and
// the sum of exponentials, one read and write for the gradient.
#pragma once
#include "ops.h"

namespace pk {

struct CrossEntropy {
  void* logits;  // [m, n] of `dtype`, in slices of `width` columns
  int dtype;
  int64_t m, n, width;
  const float* bias;       // [n], or null
  const int64_t* labels;   // [m]
  const float* row_scale;  // [m], or null
  float softcap, smoothing, z_loss;
  float* loss;  // [m]
  bool gradient;
};

}  // namespace pk

#if defined(PK_NS)  // the kernel, compiled once a level
#include <math.h>
#include "math_impl.h"

namespace PK_NS {

constexpr int64_t CHUNK = 1024;  // logits at a time, as fp32 in the first-level cache (4 KB)

// e^x for x <= 88, within 1 ulp of fp32: x = n ln 2 + r, a polynomial of degree 6 on |r| <= ln 2 / 2
// (coefficients: Cephes, expf). What lies below the smallest normal number is 0; NaN stays NaN.
static inline vf exponential(vf x) {
  const vf magic = set1(0x1.8p23f);  // adding it leaves the nearest integer in the low bits
  const vf t = fma(x, set1(1.44269504088896341f), magic), n = t - magic;
  const vf r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p * r, r, r) + set1(1.0f);
  const vf scaled = (vf)((vi)p + (((vi)t - (vi)magic) << 23));
  return select(x < set1(-87.33654f), vf{}, select(x == x, scaled, x));
}

// tanh, within 2 ulp: a polynomial below 0.625 (coefficients: Cephes, tanhf), 1 - 2e / (1 + e) with e =
// exp(-2|x|) above; and its slope 1 - tanh^2, above as 4e / (1 + e)^2, which keeps its digits where tanh has
// become 1.
static inline vf hyperbolic_tangent(vf x, vf* slope) {
  const vf z = x * x, size = (vf)((vi)x & 0x7fffffff);
  vf p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const vf near = fma(p * z, x, x), e = exponential(set1(-2.0f) * size);
  const vf q = set1(2.0f) / (set1(1.0f) + e), far = set1(1.0f) - q * e;
  *slope = select(size < set1(0.625f), set1(1.0f) - near * near, q * q * e);
  return select(size < set1(0.625f), near, (vf)((vi)far | ((vi)x & (int32_t)0x80000000)));
}

static inline float exponential1(float x) {
  float lanes[VW];
  store(lanes, exponential(set1(x)));
  return lanes[0];
}

// The logits u + bias, or softcap * tanh((u + bias) / softcap), of columns [0, count) as fp32; up to a whole
// vector padded with -inf. slope, where softcap > 0: d logit / d u.
template <typename T>
static inline __attribute__((always_inline)) void load_logits(const T* u, const float* bias, int64_t count,
                                                              float softcap, float* out, float* slope) {
  int64_t j = 0;
  for (; j + VW <= count; j += VW) store(out + j, bias ? loadx(u + j) + load(bias + j) : loadx(u + j));
  for (; j < count; j++) out[j] = to_float(u[j]) + (bias ? bias[j] : 0.0f);
  for (; j % VW; j++) out[j] = -INFINITY;
  if (softcap == 0.0f) return;
  for (j = 0; j < count; j += VW) {
    vf s;
    store(out + j, set1(softcap) * hyperbolic_tangent(load(out + j) / set1(softcap), &s));
    store(slope + j, s);
  }
  for (j = count; j % VW; j++) out[j] = -INFINITY;
}

static inline float maximum(const float* v, int64_t count) {  // NaN does not count; it shows in the sum
  // Several, or the comparisons wait for one another.
  constexpr int CHAINS = 4;
  vf best[CHAINS];
  for (vf& chain : best) chain = set1(-INFINITY);
  const auto add = [&](int chain, int64_t j) {
    const vf x = load(v + j);
    best[chain] = select(x > best[chain], x, best[chain]);
  };
  int64_t j = 0;
  for (; j + CHAINS * VW <= count; j += CHAINS * VW)
    for (int chain = 0; chain < CHAINS; chain++) add(chain, j + chain * VW);
  for (; j < count; j += VW) add(0, j);
  float lanes[CHAINS][VW], top = -INFINITY;
  for (int chain = 0; chain < CHAINS; chain++) {
    store(lanes[chain], best[chain]);
    for (float lane : lanes[chain]) top = lane > top ? lane : top;
  }
  return top;
}

struct Softmax {
  float top;   // the largest logit
  double sum;  // of exp(l - top)
  double all;  // of l
};

static inline void add_chunk(const float* v, int64_t count, bool mean, Softmax& s) {
  const float top = maximum(v, count), shifted = top > s.top ? top : s.top;
  // A row may begin with columns of -inf: no maximum yet, and nothing to add up.
  const float base = shifted == -INFINITY ? 0.0f : shifted;
  if (s.top != -INFINITY && shifted > s.top) s.sum *= exponential1(s.top - shifted);
  s.top = shifted;
  vf part[2] = {};
  int64_t j = 0;
  for (; j + 2 * VW <= count; j += 2 * VW) {
    part[0] += exponential(load(v + j) - set1(base));
    part[1] += exponential(load(v + j + VW) - set1(base));
  }
  for (; j < count; j += VW) part[0] += exponential(load(v + j) - set1(base));
  s.sum += sum(part[0] + part[1]);
  if (!mean) return;
  vf total = {};
  for (j = 0; j + VW <= count; j += VW) total += load(v + j);
  float rest = sum(total);
  for (; j < count; j++) rest += v[j];
  s.all += rest;
}

struct Row {
  const float* bias;
  int64_t n, width, step;  // step: elements from one slice of columns to the next
  int64_t label;
  float softcap, smoothing, z_loss;
};

template <typename T, typename F>
static inline __attribute__((always_inline)) void for_chunks(const Row& r, T* first, int64_t index, F&& f) {
  for (int64_t from = 0, slice = 0; from < r.n; from += r.width, slice++) {
    const int64_t size = r.width < r.n - from ? r.width : r.n - from;
    T* row = first + slice * r.step + index * size;
    for (int64_t j = 0; j < size; j += CHUNK) f(row + j, from + j, CHUNK < size - j ? CHUNK : size - j);
  }
}

// d loss / d l = scale * (weight * exp(l - top) - target); target is smoothing / n, and 1 - smoothing more at
// the label.
static inline vf gradient(const float* l, vf top, vf weight, vf target, vf scale, const float* slope) {
  const vf g = scale * fma(weight, exponential(load(l) - top), -target);
  return slope ? g * load(slope) : g;
}

template <typename T>
static void cross_entropy_row(const Row& r, T* first, int64_t index, float row_scale, bool backward,
                              float* loss) {
  alignas(64) float v[CHUNK], slope[CHUNK];
  Softmax s{-INFINITY, 0.0, 0.0};
  float at_label = 0;
  for_chunks(r, first, index, [&](T* u, int64_t from, int64_t count) {
    load_logits(u, r.bias ? r.bias + from : nullptr, count, r.softcap, v, slope);
    add_chunk(v, count, r.smoothing != 0.0f, s);
    if (r.label >= from && r.label < from + count) at_label = v[r.label - from];
  });
  const double lse = log(s.sum) + s.top, kept = 1.0 - r.smoothing;
  double value = lse - kept * at_label + r.z_loss * lse * lse;
  if (r.smoothing != 0.0f) value -= r.smoothing * (s.all / (double)r.n);
  *loss = (float)value;
  if (!backward) return;
  const vf top = set1(s.top), weight = set1((float)((1.0 + 2.0 * r.z_loss * lse) / s.sum)),
           scale = set1(row_scale);
  const float even = (float)(r.smoothing / (double)r.n), at = (float)(kept + even);
  const float* slopes = r.softcap != 0.0f ? slope : nullptr;
  for_chunks(r, first, index, [&](T* u, int64_t from, int64_t count) {
    load_logits(u, r.bias ? r.bias + from : nullptr, count, r.softcap, v, slope);
    float lanes[VW];
    int64_t j = 0;
    for (; j + VW <= count; j += VW)
      storex(u + j, gradient(v + j, top, weight, set1(even), scale, slopes ? slopes + j : nullptr));
    if (j < count)
      store(lanes, gradient(v + j, top, weight, set1(even), scale, slopes ? slopes + j : nullptr));
    for (int l = 0; j < count; j++, l++) from_float(lanes[l], u + j);
    if (r.label < from || r.label >= from + count) return;
    const int64_t here = r.label - from, vector = here / VW * VW;
    store(lanes, gradient(v + vector, top, weight, set1(at), scale, slopes ? slopes + vector : nullptr));
    from_float(lanes[here - vector], u + here);
  });
}

template <typename T>
static void cross_entropy_as(const pk::CrossEntropy& a, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < a.m; i++)
    cross_entropy_row(Row{a.bias, a.n, a.width, a.m * a.width, a.labels[i], a.softcap, a.smoothing, a.z_loss},
                      (T*)a.logits, i, a.row_scale ? a.row_scale[i] : 1.0f, a.gradient, a.loss + i);
}

static void cross_entropy(const pk::CrossEntropy& a, int threads) {
  by_dtype(a.dtype, [&](auto value) { cross_entropy_as<decltype(value)>(a, threads); });
}

}  // namespace PK_NS

#else  // the C function, compiled once, in dispatch.cpp
#include "entry.h"

extern "C" {

int pk_cross_entropy_cpu(void* logits, int dtype, int64_t m, int64_t n, int64_t width, const float* bias,
                         const int64_t* labels, const float* row_scale, float softcap, float label_smoothing,
                         float z_loss, float* loss, int gradient, int threads) {
  if (n < 1 || width < 1 || !matrix(m, n)) return PK_ERR_SHAPE;
  if (m == 0) return PK_OK;
  if (!logits || !labels || !loss) return PK_ERR_NULL;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  for (int64_t i = 0; i < m; i++)
    if (labels[i] < 0 || labels[i] >= n) return PK_ERR_SHAPE;
  const CrossEntropy of{
      logits,  dtype,           m,      n,    width < n ? width : n, bias, labels, row_scale,
      softcap, label_smoothing, z_loss, loss, gradient != 0};
  current->cross_entropy(of, threads_or_default(threads));
  return PK_OK;
}

}  // extern "C"
#endif
