// DoRA's norm in closed form, ||W + s B A||^2 = ||W||^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B by rows.
#pragma once
#include "ops.h"

namespace pk {

struct DoraNorm {
  const float* cross;  // [r, n] = A W^T
  const float* gram;   // [r, r] = A A^T
  const void* lora_b;  // [n, r] of `dtype`
  int dtype;
  int64_t n, r;
  float scaling;
  const float* squares;    // [n]
  const float* magnitude;  // [n]
  float* norm;             // [n]
  float* scale;            // [n]
};

}  // namespace pk

#if defined(PK_NS)  // the kernel, compiled once a level
#include "../checks.h"
#include "simd.h"

namespace PK_NS {

// Of one row: b [r], cross = A w with `stride` floats from one to the next, gram [r][ld] = A A^T, square =
// ||w||^2.
template <typename B>
static float row_norm(const B* b, int64_t r, float s, const float* cross, int64_t stride, const float* gram,
                      int64_t ld, float square) {
  float row[pk::MOST_RANK], mixed[pk::MOST_RANK];
  for (int64_t j = 0; j < r; j++) row[j] = to_float(b[j]), mixed[j] = 0.0f;
  for (int64_t q = 0; q < r; q++)
    for (int64_t j = 0; j < r; j++) mixed[j] += row[q] * gram[q * ld + j];
  float with_w = 0.0f, own = 0.0f;
  for (int64_t j = 0; j < r; j++) with_w += cross[j * stride] * row[j], own += mixed[j] * row[j];
  const float total = square + 2.0f * s * with_w + s * s * own;
  return total > 0.0f ? __builtin_sqrtf(total) : total == total ? 0.0f : total;
}

template <typename B>
static void dora_norm_as(const pk::DoraNorm& a, int threads) {
  const B* b = (const B*)a.lora_b;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < a.n; i++) {
    a.norm[i] = row_norm(b + i * a.r, a.r, a.scaling, a.cross + i, a.n, a.gram, a.r, a.squares[i]);
    a.scale[i] = a.magnitude[i] / a.norm[i];
  }
}

static void dora_norm(const pk::DoraNorm& a, int threads) {
  by_dtype(a.dtype, [&](auto value) { dora_norm_as<decltype(value)>(a, threads); });
}

}  // namespace PK_NS

#else  // the C function, compiled once, in dispatch.cpp
#include "entry.h"

extern "C" {

int pk_dora_norm_cpu(const float* cross, const float* gram, const void* lora_b, int dtype, int64_t n,
                     int64_t r, float scaling, const float* squares, const float* magnitude, float* norm,
                     float* scale, int threads) {
  if (r < 1 || bad_rank(r) || !matrix(n, r)) return PK_ERR_SHAPE;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  if (n == 0) return PK_OK;
  if (!cross || !gram || !lora_b || !squares || !magnitude || !norm || !scale) return PK_ERR_NULL;
  const DoraNorm of{cross, gram, lora_b, dtype, n, r, scaling, squares, magnitude, norm, scale};
  current->dora_norm(of, threads_or_default(threads));
  return PK_OK;
}

}  // extern "C"
#endif
