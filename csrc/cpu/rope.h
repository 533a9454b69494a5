// Rotary position embedding of q and k in one pass: a token's angles serve all its heads. fp32 inside, one
// rounding.
#pragma once
#include "ops.h"

namespace pk {

struct Rope {
  pk_rope_heads heads[2];  // of q and of k
  int dtype;
  int64_t batch, seq, dim;
  const void* cos;  // [batch or 1, seq, rotary] of `angle_dtype`
  const void* sin;
  int angle_dtype;
  int64_t angle_batch;  // 0: one for all
  int64_t rotary;
  bool inverse;
};

}  // namespace pk

#if defined(PK_NS)  // the kernel, compiled once a level
#include "vectors.h"

namespace PK_NS {

constexpr int64_t ROPE_PARALLEL = 1 << 14;  // elements from which a parallel region pays. Not measured.

// One head of one token. y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2, where 1 and 2 are the halves; the inverse is
// the transposed matrix: x1 = y1 c1 + y2 s2, x2 = y2 c2 - y1 s1 (the two halves of the angles need not be
// equal).
template <typename T, typename A>
static inline void rope_head(const T* x, T* y, const A* cos, const A* sin, int64_t rotary, int64_t dim,
                             bool inverse) {
  const int64_t half = rotary / 2;
  by_vectors<vf2>(0, half, [&](int64_t i, auto some) {
    const auto x1 = some.load(x + i), x2 = some.load(x + half + i);
    const auto s1 = some.load(sin + i), s2 = some.load(sin + half + i);
    some.store(y + i, fma(x1, some.load(cos + i), x2 * (inverse ? s2 : -s1)));
    some.store(y + half + i, fma(x2, some.load(cos + half + i), x1 * (inverse ? -s1 : s2)));
  });
  if (rotary < dim) memcpy(y + rotary, x + rotary, (size_t)(dim - rotary) * sizeof(T));
}

template <typename T, typename A>
static void rope_of(const pk::Rope& a, int threads) {
  const int64_t elements = a.batch * a.seq * (a.heads[0].heads + a.heads[1].heads) * a.dim;
#pragma omp parallel for schedule(static) num_threads(threads) if (elements >= ROPE_PARALLEL)
  for (int64_t token = 0; token < a.batch * a.seq; token++) {
    const int64_t b = token / a.seq, s = token % a.seq, angle = b * a.angle_batch + s * a.rotary;
    const A *cos = (const A*)a.cos + angle, *sin = (const A*)a.sin + angle;
    for (const pk_rope_heads& h : a.heads) {
      const T* x = (const T*)h.x + b * h.x_batch + s * h.x_seq;
      T* y = (T*)h.y + b * h.y_batch + s * h.y_seq;
      for (int64_t head = 0; head < h.heads; head++)
        rope_head(x + head * h.x_head, y + head * h.y_head, cos, sin, a.rotary, a.dim, a.inverse);
    }
  }
}

static void rope(const pk::Rope& a, int threads) {
  by_dtype(a.dtype, [&](auto value) {
    by_dtype(a.angle_dtype, [&](auto angle) { rope_of<decltype(value), decltype(angle)>(a, threads); });
  });
}

}  // namespace PK_NS

#else  // the C function, compiled once, in dispatch.cpp
#include "entry.h"

namespace pk {

// Of one of rope's operands, in a batch of `seq` tokens with heads of `dim`.
static inline int check_heads(const pk_rope_heads& h, int64_t batch, int64_t seq, int64_t dim) {
  if (!matrix(batch, seq) || !matrix(batch * seq, dim) || !matrix(h.heads, dim) ||
      !matrix(batch * seq, h.heads * dim))
    return PK_ERR_SHAPE;
  const bool x = reaches(batch, h.x_batch) && reaches(h.heads, h.x_head) && reaches(seq, h.x_seq);
  return x && reaches(batch, h.y_batch) && reaches(h.heads, h.y_head) && reaches(seq, h.y_seq) ? PK_OK
                                                                                               : PK_ERR_SHAPE;
}

}  // namespace pk

extern "C" {

int pk_rope_cpu(const pk_rope_heads* q, const pk_rope_heads* k, int dtype, int64_t batch, int64_t seq,
                int64_t dim, const void* cos, const void* sin, int angle_dtype, int64_t angle_batch,
                int64_t rotary, int inverse, int threads) {
  if (!q || !k) return PK_ERR_NULL;
  if (rotary < 0 || rotary > dim || rotary % 2 || !reaches(batch, angle_batch)) return PK_ERR_SHAPE;
  if (int bad = check_heads(*q, batch, seq, dim)) return bad;
  if (int bad = check_heads(*k, batch, seq, dim)) return bad;
  if (bad_dtype(dtype) || bad_dtype(angle_dtype)) return PK_ERR_DTYPE;
  if (batch == 0 || seq == 0 || dim == 0 || q->heads + k->heads == 0) return PK_OK;
  if ((q->heads && (!q->x || !q->y)) || (k->heads && (!k->x || !k->y)) || (rotary && (!cos || !sin)))
    return PK_ERR_NULL;
  const Rope of{{*q, *k}, dtype, batch, seq, dim, cos, sin, angle_dtype, angle_batch, rotary, inverse != 0};
  current->rope(of, threads_or_default(threads));
  return PK_OK;
}

}  // extern "C"
#endif
