/* Uses csrc/ from plain C: quantizes a weight, decodes it, runs the fused linear with its low-rank branch, and checks every result
 * against sums in double. Exit status 0 where all agree. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "peftkern.h"

enum { M = 24, N = 96, K = 128, R = 8, BLOCKSIZE = 64, BLOCKS = N * K / BLOCKSIZE };

static const float NF4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
                              -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                              0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

static float weight[N * K], decoded[N * K], absmax[BLOCKS], x[M * K], y[M * N], xa[M * R], lora_a[R * K], lora_b[N * R], bias[N];
static uint8_t packed[N * K / 2];

static void must(int status, const char* what) {
  if (status == PK_OK) return;
  fprintf(stderr, "%s: %s\n", what, pk_status_string(status));
  exit(1);
}

/* Values in [-1, 1), the same on every run. */
static void fill(float* out, int count) {
  static uint32_t state = 1;
  for (int i = 0; i < count; i++) {
    state = state * 1664525u + 1013904223u;
    out[i] = (float)(int32_t)state / 2147483648.0f;
  }
}

/* A decoded value is the nearest code times its block's absmax: off by at most half the widest gap between two codes. */
static double worst_rounding(void) {
  double worst = 0;
  for (int i = 0; i < N * K; i++) worst = fmax(worst, fabs((double)decoded[i] - weight[i]) / absmax[i / BLOCKSIZE]);
  return worst;
}

/* y = x W^T + scaling * (x A^T) B^T + bias, in double from the decoded weight; returns the worst relative deviation. */
static double worst_error(float scaling) {
  double worst = 0;
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      double sum = bias[n], size = fabs(bias[n]);
      for (int k = 0; k < K; k++) {
        sum += (double)x[m * K + k] * decoded[n * K + k];
        size += fabs((double)x[m * K + k] * decoded[n * K + k]);
      }
      for (int r = 0; r < R; r++) {
        double low = 0;
        for (int k = 0; k < K; k++) low += (double)x[m * K + k] * lora_a[r * K + k];
        sum += scaling * low * lora_b[n * R + r];
        size += fabs(scaling * low * lora_b[n * R + r]);
      }
      worst = fmax(worst, fabs(y[m * N + n] - sum) / size);
    }
  return worst;
}

int main(void) {
  const float scaling = 0.5f;
  fill(weight, N * K);
  fill(x, M * K);
  fill(lora_a, R * K);
  fill(lora_b, N * R);
  fill(bias, N);

  must(pk_quantize_4bit_cpu(weight, PK_F32, N * K, BLOCKSIZE, NF4, packed, absmax, 0), "quantize");
  const pk_weight w = {.data = packed, .code = NF4, .absmax = absmax, .n = N, .k = K, .blocksize = BLOCKSIZE};
  must(pk_dequantize_4bit_cpu(&w, 0, N, 0, K, decoded, PK_F32, 0), "dequantize");

  const pk_lora lora = {.lora_a = lora_a, .lora_b = lora_b, .r = R, .dtype = PK_F32, .scaling = scaling};
  const int64_t bytes = pk_qlora_linear_scratch_bytes(M, N, K, R, 0);
  void* scratch = malloc((size_t)bytes);
  must(scratch ? PK_OK : PK_ERR_NULL, "scratch");
  double error = 0;
  for (int gemv = 0; gemv < 2; gemv++) { /* both kernels: by blocks, and for few rows */
    must(pk_qlora_linear_fwd_cpu(&w, &lora, x, PK_F32, M, bias, PK_F32, y, xa, gemv, scratch, bytes, 0), "qlora_linear_fwd");
    error = fmax(error, worst_error(scaling));
  }
  free(scratch);

  const double rounding = worst_rounding(), half_gap = (1.0 - 0.6961928009986877) / 2;
  printf("peftkern ABI %d, ISA %s: worst rounding %.4f of absmax (at most %.4f), worst error %.1e (scratch %lld bytes)\n", pk_abi_version(), pk_isa(),
         rounding, half_gap, error, (long long)bytes);
  return rounding <= half_gap + 1e-6 && error < 1e-6 ? 0 : 1;
}
