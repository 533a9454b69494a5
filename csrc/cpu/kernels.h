// What one ISA's translation unit offers to the dispatcher.
#pragma once
#include "../include/peftkern.h"

namespace pk {

struct Kernels {
  const char* name;
  int lanes;
  void (*quantize)(const void* w, int dtype, int64_t numel, int32_t blocksize, const float* code, uint8_t* packed, float* absmax, int threads);
  void (*quantize_absmax)(const float* absmax, int64_t count, int32_t blocksize, const float* code, uint8_t* out, float* nested, int threads);
  void (*dequantize)(const pk_weight& w, int64_t row, int64_t rows, int64_t col, int64_t cols, void* out, int dtype, int threads);
  void (*gemv)(const pk_weight& w, const pk_lora& lora, const void* x, int dtype, int64_t m, const void* bias, int bias_dtype, void* y, float* xa,
               float* scratch, int threads);
  void (*forward)(const pk_weight* w, const pk_lora& lora, const void* x, int dtype, int64_t m, int64_t n, int64_t k, const void* bias, int bias_dtype,
                  void* y, float* xa, float* scratch, int threads);
  void (*backward)(const pk_weight* w, const pk_lora& lora, const void* dy, const void* x, int dtype, int64_t m, int64_t n, int64_t k, const float* xa,
                   float* dyb, void* dx, void* d_a, void* d_b, float* d_bias, float* scratch, int threads);
  void (*dropout_mask)(int64_t m, int64_t k, uint32_t threshold, uint64_t seed, float* mask, int threads);
  void (*cross_entropy)(void* logits, int dtype, int64_t m, int64_t n, int64_t width, const float* bias, const int64_t* labels,
                        const float* row_scale, float softcap, float smoothing, float z_loss, float* loss, int backward, int threads);
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace pk
