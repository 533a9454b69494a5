// DoRA's norm in closed form, ||W + s B A||^2 = ||W||^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B by rows.
#pragma once
#include "simd.h"

namespace PK_NS {

constexpr int64_t MAX_RANK = 256;

// Of one row: b [r], cross = A w with `stride` floats from one to the next, gram [r][ld] = A A^T, square =
// ||w||^2.
template <typename B>
static float row_norm(const B* b, int64_t r, float s, const float* cross, int64_t stride, const float* gram,
                      int64_t ld, float square) {
  float row[MAX_RANK], mixed[MAX_RANK];
  for (int64_t j = 0; j < r; j++) row[j] = to_float(b[j]), mixed[j] = 0.0f;
  for (int64_t q = 0; q < r; q++)
    for (int64_t j = 0; j < r; j++) mixed[j] += row[q] * gram[q * ld + j];
  float with_w = 0.0f, own = 0.0f;
  for (int64_t j = 0; j < r; j++) with_w += cross[j * stride] * row[j], own += mixed[j] * row[j];
  const float total = square + 2.0f * s * with_w + s * s * own;
  return total > 0.0f ? __builtin_sqrtf(total) : total == total ? 0.0f : total;
}

// cross [r][n], gram [r][r].
template <typename B>
static void dora_norm_as(const float* cross, const float* gram, const B* b, int64_t n, int64_t r, float s,
                         const float* squares, const float* magnitude, float* norm, float* scale,
                         int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; i++) {
    norm[i] = row_norm(b + i * r, r, s, cross + i, n, gram, r, squares[i]);
    scale[i] = magnitude[i] / norm[i];
  }
}

static void dora_norm(const float* cross, const float* gram, const void* b, int dtype, int64_t n, int64_t r,
                      float s, const float* squares, const float* magnitude, float* norm, float* scale,
                      int threads) {
  if (dtype == PK_F32)
    dora_norm_as(cross, gram, (const float*)b, n, r, s, squares, magnitude, norm, scale, threads);
  else if (dtype == PK_BF16)
    dora_norm_as(cross, gram, (const bf16*)b, n, r, s, squares, magnitude, norm, scale, threads);
  else dora_norm_as(cross, gram, (const f16*)b, n, r, s, squares, magnitude, norm, scale, threads);
}

}  // namespace PK_NS
