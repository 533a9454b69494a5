// exp and what activations are made of, VW floats at a time, without libm: the same code on every level. Errors are in units in the last place
// of the result; tests/ops/test_glu.py holds the activations made of them to theirs.
#pragma once
#include "simd.h"

namespace PK_NS {

static inline __attribute__((always_inline)) vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
static inline __attribute__((always_inline)) vf absolute(vf v) { return (vf)((vu)v & 0x7fffffff); }

// The first `count` of a vector; what is missing is 0.
template <typename T>
static inline __attribute__((always_inline)) vf load_some(const T* p, int64_t count) {
  if (count >= VW) return loadx(p);
  T part[VW] = {};
  memcpy(part, p, (size_t)count * sizeof(T));
  return loadx(part);
}
template <typename T>
static inline __attribute__((always_inline)) void store_some(T* p, vf v, int64_t count) {
  if (count >= VW) return storex(p, v);
  T part[VW];
  storex(part, v);
  memcpy(p, part, (size_t)count * sizeof(T));
}

// e^(x + low) for x <= 0 and -0.06 <= low <= 0: at most 2 ulp, 0 below -104, NaN stays. `low` is what did not fit into x.
static inline __attribute__((always_inline)) vf exp_negative(vf x, vf low) {
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
  x = select(x < set1(-104.0f), set1(-104.0f), x);
  const vf shifted = fma(x, set1(1.44269504f), set1(MAGIC)), whole = shifted - set1(MAGIC);
  vf r = fma(whole, set1(-0.693359375f), x);  // ln 2's first 10 bits: the product is exact, fused or not
  r = fma(whole, set1(2.12194440e-4f), r) + low;
  vf p = set1(0x1.6345b6p-10f);  // minimax of degree 6 on [-0.40, 0.36], 2^-28
  p = fma(p, r, set1(0x1.1296b6p-7f));
  p = fma(p, r, set1(0x1.556402p-5f));
  p = fma(p, r, set1(0x1.5553b4p-3f));
  p = fma(p, r, set1(0x1.ffffeap-2f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  const vi n = (vi)shifted - (int32_t)0x4b400000, first = n >> 1;  // two factors, as 2^n may be subnormal
  return p * (vf)((vu)(first + 127) << 23) * (vf)((vu)(n - first + 127) << 23);
}

// value = x s, s = 1 / (1 + e^-z) and rest = 1 - s, none of them a difference of near numbers. x s has a division of its own: as many
// roundings as x / (1 + e^-x) has; where s is not used, the compiler drops the other one.
static inline __attribute__((always_inline)) void times_sigmoid(vf x, vf z, vf& value, vf& s, vf& rest) {
  const vf e = exp_negative(-absolute(z), vf{}), whole = set1(1.0f) + e, larger = set1(1.0f) / whole, smaller_one = e * larger;
  const vi positive = z >= vf{};
  value = select(positive, x, x * e) / whole;
  s = select(positive, larger, smaller_one);
  rest = select(positive, smaller_one, larger);
}

// The normal distribution at x: `below` = (1 + erf(x / sqrt 2)) / 2 to 5 ulp, to 12 down in its tail of
// 1e-38, and its density.
static inline __attribute__((always_inline)) void normal(vf x, vf& below, vf& density) {
  vf a = absolute(x);
  a = select(a > set1(15.0f), set1(15.0f), a);  // e^(-a^2 / 2) is 0 from 14.5 on
  const vf high = (vf)((vu)a & 0xfffff000), low = (a - high) * (a + high) * set1(-0.5f);  // high^2 is exact: a^2's rounding would cost 100 ulp
  const vf bell = exp_negative(high * high * set1(-0.5f), low);
  const vf u = (a + a) / (a + set1(3.0f)) - set1(1.0f);  // (a - 3) / (a + 3), rounded less where a is small
  vf p = set1(-1.173552618638496e-06f);  // e^(a^2 / 2) erfc(a / sqrt 2) / 2 by u: minimax of degree 10 for a <= 14.5, 2^-26.9
  p = fma(p, u, set1(5.230370879871771e-05f));
  p = fma(p, u, set1(0.00011664293560897931f));
  p = fma(p, u, set1(-0.00033811008324846625f));
  p = fma(p, u, set1(-0.0009841583669185638f));
  p = fma(p, u, set1(0.002904093824326992f));
  p = fma(p, u, set1(0.006132144946604967f));
  p = fma(p, u, set1(-0.04621323570609093f));
  p = fma(p, u, set1(0.12322502583265305f));
  p = fma(p, u, set1(-0.20640261471271515f));
  p = fma(p, u, set1(0.12151394784450531f));
  const vf tail = bell * p;
  below = select(x >= vf{}, set1(1.0f) - tail, tail);
  density = bell * set1(0.3989422804f);
}

}  // namespace PK_NS
