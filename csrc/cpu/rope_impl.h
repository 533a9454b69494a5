// Rotary position embedding of q and k in one pass: a token's angles serve all its heads. fp32 inside, one
// rounding.
#pragma once
#include "kernels.h"
#include "math_impl.h"

namespace PK_NS {

constexpr int64_t ROPE_PARALLEL = 1 << 14;  // elements from which a parallel region pays. Not measured.

// One head of one token. y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2, where 1 and 2 are the halves; the inverse is
// the transposed matrix: x1 = y1 c1 + y2 s2, x2 = y2 c2 - y1 s1 (the two halves of the angles need not be
// equal).
template <typename T, typename A>
static inline void rope_head(const T* x, T* y, const A* cos, const A* sin, int64_t rotary, int64_t dim,
                             bool inverse) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; i += VW) {
    const int64_t n = half - i;
    const vf x1 = load_some(x + i, n), x2 = load_some(x + half + i, n);
    const vf s1 = load_some(sin + i, n), s2 = load_some(sin + half + i, n);
    const vf first = inverse ? s2 : -s1, second = inverse ? -s1 : s2;
    store_some(y + i, fma(x1, load_some(cos + i, n), x2 * first), n);
    store_some(y + half + i, fma(x2, load_some(cos + half + i, n), x1 * second), n);
  }
  if (rotary < dim) memcpy(y + rotary, x + rotary, (size_t)(dim - rotary) * sizeof(T));
}

template <typename T, typename A>
static void rope_of(const pk_rope_heads* qk, int64_t batch, int64_t seq, int64_t dim, const A* cos,
                    const A* sin, int64_t angle_batch, int64_t rotary, bool inverse, int threads) {
#pragma omp parallel for schedule(static) \
    num_threads(threads) if (batch * seq * (qk[0].heads + qk[1].heads) * dim >= ROPE_PARALLEL)
  for (int64_t token = 0; token < batch * seq; token++) {
    const int64_t b = token / seq, s = token % seq, angle = b * angle_batch + s * rotary;
    for (int which = 0; which < 2; which++) {
      const pk_rope_heads& h = qk[which];
      const T* x = (const T*)h.x + b * h.x_batch + s * h.x_seq;
      T* y = (T*)h.y + b * h.y_batch + s * h.y_seq;
      for (int64_t head = 0; head < h.heads; head++)
        rope_head(x + head * h.x_head, y + head * h.y_head, cos + angle, sin + angle, rotary, dim, inverse);
    }
  }
}

template <typename T>
static void rope_as(const pk_rope_heads* qk, int64_t batch, int64_t seq, int64_t dim, const void* cos,
                    const void* sin, int angle_dtype, int64_t angle_batch, int64_t rotary, bool inverse,
                    int threads) {
  if (angle_dtype == PK_F32)
    rope_of<T>(qk, batch, seq, dim, (const float*)cos, (const float*)sin, angle_batch, rotary, inverse,
               threads);
  else if (angle_dtype == PK_BF16)
    rope_of<T>(qk, batch, seq, dim, (const bf16*)cos, (const bf16*)sin, angle_batch, rotary, inverse,
               threads);
  else
    rope_of<T>(qk, batch, seq, dim, (const f16*)cos, (const f16*)sin, angle_batch, rotary, inverse, threads);
}

static void rope(const pk_rope_heads* qk, int dtype, int64_t batch, int64_t seq, int64_t dim, const void* cos,
                 const void* sin, int angle_dtype, int64_t angle_batch, int64_t rotary, int inverse,
                 int threads) {
  if (dtype == PK_F32)
    rope_as<float>(qk, batch, seq, dim, cos, sin, angle_dtype, angle_batch, rotary, inverse, threads);
  else if (dtype == PK_BF16)
    rope_as<bf16>(qk, batch, seq, dim, cos, sin, angle_dtype, angle_batch, rotary, inverse, threads);
  else rope_as<f16>(qk, batch, seq, dim, cos, sin, angle_dtype, angle_batch, rotary, inverse, threads);
}

}  // namespace PK_NS
