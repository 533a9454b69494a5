// Vectors side by side, and loops over elements by them: a chain of dependent instructions alone leaves a
// core waiting, which looks ahead over one or two of them.
#pragma once
#include <type_traits>

#include "simd.h"

namespace PK_NS {

#define PK_INLINE static inline __attribute__((always_inline))
#define PK_BESIDE       \
  template <typename V> \
  PK_INLINE Beside<V>

// Two of V, of which each is a vector or two.
template <typename V>
struct Beside {
  V a, b;
};
using vf2 = Beside<vf>;
using vf4 = Beside<vf2>;
using vf8 = Beside<vf4>;

PK_BESIDE operator+(Beside<V> x, Beside<V> y) { return {x.a + y.a, x.b + y.b}; }
PK_BESIDE operator-(Beside<V> x, Beside<V> y) { return {x.a - y.a, x.b - y.b}; }
PK_BESIDE operator*(Beside<V> x, Beside<V> y) { return {x.a * y.a, x.b * y.b}; }
PK_BESIDE operator/(Beside<V> x, Beside<V> y) { return {x.a / y.a, x.b / y.b}; }
PK_BESIDE operator-(Beside<V> x) { return {-x.a, -x.b}; }
PK_BESIDE fma(Beside<V> x, Beside<V> y, Beside<V> z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }

template <typename V>
PK_INLINE V constant(float value) {
  if constexpr (std::is_same_v<V, vf>) return set1(value);
  else return {constant<decltype(V::a)>(value), constant<decltype(V::b)>(value)};
}

// All vectors' sum, halves on halves.
PK_INLINE vf folded(vf v) { return v; }
template <typename V>
PK_INLINE vf folded(Beside<V> v) {
  return folded(v.a) + folded(v.b);
}

// ---- loads and stores

template <typename T>
PK_INLINE void load_full(const T* p, vf& v) {
  v = loadx(p);
}
template <typename T, typename V>
PK_INLINE void load_full(const T* p, Beside<V>& v) {
  load_full(p, v.a);
  load_full(p + sizeof(V) / sizeof(float), v.b);
}
// Whether one instruction has rounded and stored them all. It makes numbers below 2^-126 zero: where one is,
// by the way of the other levels.
template <typename T, typename V>
PK_INLINE bool stored_at_once(T*, V) {
  return false;
}
#if defined(PK_AVX512BF16)
PK_INLINE bool stored_at_once(bf16* p, vf2 v) {
  constexpr int SUBNORMAL = 0x20;
  if (__builtin_expect(
          _mm512_fpclass_ps_mask((__m512)v.a, SUBNORMAL) | _mm512_fpclass_ps_mask((__m512)v.b, SUBNORMAL), 0))
    return false;
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a));
  return true;
}
#endif
template <typename T>
PK_INLINE void store_full(T* p, vf v) {
  storex(p, v);
}
template <typename T, typename V>
PK_INLINE void store_full(T* p, Beside<V> v) {
  if (stored_at_once(p, v)) return;
  store_full(p, v.a);
  store_full(p + sizeof(V) / sizeof(float), v.b);
}

// The first `count` of a vector; what is missing is 0.
template <typename T>
PK_INLINE vf load_some(const T* p, int64_t count) {
  if (count >= VW) return loadx(p);
  T part[VW] = {};
  memcpy(part, p, (size_t)count * sizeof(T));
  return loadx(part);
}
template <typename T>
PK_INLINE void store_some(T* p, vf v, int64_t count) {
  if (count >= VW) return storex(p, v);
  T part[VW];
  storex(part, v);
  memcpy(p, part, (size_t)count * sizeof(T));
}

// ---- loops

// The elements of one step of a loop: all of a V, or the first of a vector.
template <typename V>
struct Whole {
  template <typename T>
  V load(const T* p) const {
    V v;
    load_full(p, v);
    return v;
  }
  template <typename T>
  void store(T* p, V v) const {
    store_full(p, v);
  }
  static V& of(V& sums) { return sums; }
};
struct First {
  int64_t count;
  template <typename T>
  vf load(const T* p) const {
    return load_some(p, count);
  }
  template <typename T>
  void store(T* p, vf v) const {
    store_some(p, v, count);
  }
  // What adds to sums of several vectors: the first.
  static vf& of(vf& sums) { return sums; }
  template <typename V>
  static vf& of(Beside<V>& sums) {
    return of(sums.a);
  }
};

// `part(i, elements)` for the elements from i to `stop`, by V as long as there are so many, then by vectors.
template <typename V, typename F>
PK_INLINE void by_vectors(int64_t i, int64_t stop, F part) {
  constexpr int64_t COUNT = sizeof(V) / sizeof(float);
  for (; i + COUNT <= stop; i += COUNT) part(i, Whole<V>{});
  for (; i < stop; i += VW) part(i, First{stop - i});
}

}  // namespace PK_NS
