// DoRA's norm in closed form, ||W + s B A||^2 = ||W||^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B by rows.
#pragma once
#include "../checks.h"
#include "kernels.h"
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
