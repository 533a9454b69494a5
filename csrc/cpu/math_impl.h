// exp and what activations are made of, by vectors alone or side by side (vectors.h), without libm. For
// results of 32 bits errors are in units in their last place; for results of 16 bits (FINE false) they are
// 2^-16 of the value, a twentieth of fp16's rounding. tests/ops/test_glu.py holds the activations made of
// them to theirs.
#pragma once
#include "vectors.h"

namespace PK_NS {

PK_INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
PK_INLINE vf absolute(vf v) { return (vf)((vu)v & 0x7fffffff); }

// x >= 0 ? yes : no, and the smaller or larger of x and a number, where NaN stays NaN.
PK_INLINE vf where_positive(vf x, vf yes, vf no) {
#if defined(PK_AVX512)
  return (vf)_mm512_mask_mov_ps((__m512)no, _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_GE_OQ),
                                (__m512)yes);
#else
  return select(x >= vf{}, yes, no);
#endif
}
PK_INLINE vf at_most(vf x, float limit) {
#if defined(PK_AVX512)
  return (vf)_mm512_min_ps((__m512)set1(limit), (__m512)x);
#elif defined(PK_AVX2)
  return (vf)_mm256_min_ps((__m256)set1(limit), (__m256)x);
#else
  return select(x > set1(limit), set1(limit), x);
#endif
}
PK_INLINE vf at_least(vf x, float limit) {
#if defined(PK_AVX512)
  return (vf)_mm512_max_ps((__m512)set1(limit), (__m512)x);
#elif defined(PK_AVX2)
  return (vf)_mm256_max_ps((__m256)set1(limit), (__m256)x);
#else
  return select(x < set1(limit), set1(limit), x);
#endif
}

// v 2^n for whole numbers n >= -152, which stand in `shifted`, n + MAGIC, too. 2^n may be subnormal: two
// factors.
// 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits.
constexpr float MAGIC = 12582912.0f;
PK_INLINE vf times_power(vf v, vf n, vf shifted) {
#if defined(PK_AVX512)
  (void)shifted;
  return (vf)_mm512_scalef_ps((__m512)v, (__m512)n);
#else
  (void)n;
  const vi whole = (vi)shifted - (int32_t)0x4b400000, first = whole >> 1;
  return v * (vf)((vu)(first + 127) << 23) * (vf)((vu)(whole - first + 127) << 23);
#endif
}

// 1 / v of numbers neither tiny nor huge, to 2^-23 of it.
PK_INLINE vf inverse(vf v) {
#if defined(PK_AVX512)
  const vf guess = (vf)_mm512_rcp14_ps((__m512)v);
  return fma(fma(-v, guess, set1(1.0f)), guess, guess);
#else
  return set1(1.0f) / v;
#endif
}

PK_BESIDE inverse(Beside<V> v) { return {inverse(v.a), inverse(v.b)}; }
PK_BESIDE absolute(Beside<V> v) { return {absolute(v.a), absolute(v.b)}; }
PK_BESIDE at_most(Beside<V> x, float limit) { return {at_most(x.a, limit), at_most(x.b, limit)}; }
PK_BESIDE at_least(Beside<V> x, float limit) { return {at_least(x.a, limit), at_least(x.b, limit)}; }
PK_BESIDE where_positive(Beside<V> x, Beside<V> yes, Beside<V> no) {
  return {where_positive(x.a, yes.a, no.a), where_positive(x.b, yes.b, no.b)};
}
PK_BESIDE times_power(Beside<V> v, Beside<V> n, Beside<V> shifted) {
  return {times_power(v.a, n.a, shifted.a), times_power(v.b, n.b, shifted.b)};
}

// The high 12 bits of the significand: a number whose square is exact.
PK_INLINE vf high_part(vf v) { return (vf)((vu)v & 0xfffff000); }
PK_BESIDE high_part(Beside<V> v) { return {high_part(v.a), high_part(v.b)}; }

// ---- functions

template <typename V>
PK_INLINE V horner(V, V p) {
  return p;
}
template <typename V, typename... Rest>
PK_INLINE V horner(V x, V p, float next, Rest... rest) {
  return horner(x, fma(p, x, constant<V>(next)), rest...);
}

// e^(x + low) for x <= 0 and -0.06 <= low <= 0: at most 2 ulp, 0 below -104, NaN stays. `low` is what did not
// fit into x.
template <typename V>
PK_INLINE V exp_negative(V x, V low) {
  x = at_least(x, -104.0f);
  const V shifted = fma(x, constant<V>(1.44269504f), constant<V>(MAGIC)),
          whole = shifted - constant<V>(MAGIC);
  // ln 2's first 10 bits: the product is exact, fused or not.
  V r = fma(whole, constant<V>(-0.693359375f), x);
  r = fma(whole, constant<V>(2.12194440e-4f), r) + low;
  const V p = horner(r, constant<V>(0x1.6345b6p-10f), 0x1.1296b6p-7f, 0x1.556402p-5f, 0x1.5553b4p-3f,
                     0x1.ffffeap-2f, 1.0f,
                     1.0f);  // minimax of degree 6 on [-0.40, 0.36], 2^-28
  return times_power(p, whole, shifted);
}

// 2^x for -152 <= x <= 0, to 2^-17 of it.
template <typename V>
PK_INLINE V exp2_coarse(V x) {
  const V shifted = x + constant<V>(MAGIC), whole = shifted - constant<V>(MAGIC);
  const V p = horner(x - whole, constant<V>(0x1.3997cap-7f), 0x1.ca1440p-5f, 0x1.ec06dap-3f, 0x1.62e0dcp-1f,
                     0x1.ffffe8p-1f);  // minimax of degree 4 on [-0.5, 0.5], 2^-18.5
  return times_power(p, whole, shifted);
}

// value = x s, s = 1 / (1 + e^-z) and rest = 1 - s, none of them a difference of near numbers. x s has a
// division of its own where it is to be fine: as many roundings as x / (1 + e^-x) has; where s is not used,
// the compiler drops the other.
template <bool FINE, typename V>
PK_INLINE void times_sigmoid(V x, V z, V& value, V& s, V& rest) {
  const V one = constant<V>(1.0f);
  V e;
  if constexpr (FINE) e = exp_negative(-absolute(z), constant<V>(0.0f));
  else e = exp2_coarse(at_least(absolute(z) * constant<V>(-1.44269504f), -150.0f));
  const V whole = one + e, larger = FINE ? one / whole : inverse(whole), smaller_one = e * larger;
  s = where_positive(z, larger, smaller_one);
  rest = where_positive(z, smaller_one, larger);
  value = FINE ? where_positive(z, x, x * e) / whole : x * s;
}

// The normal distribution at x: `below` = (1 + erf(x / sqrt 2)) / 2, fine to 5 ulp, to 12 down in its tail of
// 1e-38, and its density. e^(a^2 / 2) erfc(a / sqrt 2) / 2 is a polynomial in u = (a - 3) / (a + 3), rounded
// less where a is small.
template <bool FINE, typename V>
PK_INLINE void normal(V x, V& below, V& density) {
  const V a = at_most(absolute(x), FINE ? 15.0f : 14.5f);  // e^(-a^2 / 2) is 0 from 14.5 on
  const V above = a + constant<V>(3.0f),
          u = FINE ? (a + a) / above - constant<V>(1.0f) : fma(a + a, inverse(above), constant<V>(-1.0f));
  V bell, p;
  if constexpr (FINE) {
    const V high = high_part(a),
            low = (a - high) * (a + high) * constant<V>(-0.5f);  // a^2's rounding would cost 100 ulp
    bell = exp_negative(high * high * constant<V>(-0.5f), low);
    p = horner(u, constant<V>(-1.173552618638496e-06f), 5.230370879871771e-05f, 0.00011664293560897931f,
               -0.00033811008324846625f, -0.0009841583669185638f, 0.002904093824326992f,
               0.006132144946604967f, -0.04621323570609093f, 0.12322502583265305f, -0.20640261471271515f,
               0.12151394784450531f);  // minimax for a <= 14.5, 2^-26.9
  } else {
    bell = exp2_coarse(a * a * constant<V>(-0.72134752f));
    p = horner(u, constant<V>(-0.0006482129101641476f), 0.002584280213341117f, 0.005944704171270132f,
               -0.04610616713762283f, 0.1232505738735199f, -0.2064124047756195f,
               0.12151366472244263f);  // minimax for a <= 14.5, 2^-16.6
  }
  const V tail = bell * p;
  below = where_positive(x, constant<V>(1.0f) - tail, tail);
  density = bell * constant<V>(0.3989422804f);
}

}  // namespace PK_NS
