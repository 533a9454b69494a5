// What one ISA's translation unit offers to the dispatcher.
#pragma once
#include "group.h"

namespace pk {

struct Kernels {
  const char* name;
  int lanes;
  bool tiles;  // bf16 products of 4-bit weights are those of tile_impl.h
  void (*quantize)(const void* w, int dtype, int64_t numel, int32_t blocksize, const float* code,
                   uint8_t* packed, float* absmax, int threads);
  void (*quantize_absmax)(const float* absmax, int64_t count, int32_t blocksize, const float* code,
                          uint8_t* out, float* nested, int threads);
  void (*dequantize)(const pk_weight& w, int64_t row, int64_t rows, int64_t col, int64_t cols, void* out,
                     int dtype, int threads);
  void (*gemv)(const pk_weight& w, const pk_lora& lora, const void* x, int dtype, int64_t m, const void* bias,
               int bias_dtype, void* y, float* xa, float* scratch, int threads);
  void (*forward)(const Group& group, const void* x, int dtype, int64_t m, float* scratch, int threads);
  void (*backward)(const Group& group, const void* x, int dtype, int64_t m, void* dx, float* scratch,
                   int threads);
  void (*dropout_mask)(int64_t m, int64_t k, uint32_t threshold, uint64_t seed, float* mask, int threads);
  void (*glu)(const pk_glu& operands, const pk_glu_grad* grads, int dtype, int64_t m, int64_t n,
              int activation, const void* dy, void* h, int threads);
  void (*rms_norm)(const pk_rms_norm& norm, const void* residual, void* s, void* y, float* rstd,
                   float* scratch, int threads);
  void (*rms_norm_grad)(const pk_rms_norm& norm, const void* dy, const void* ds, const float* rstd, void* dx,
                        float* d_weight, float* scratch, int threads);
  void (*rope)(const pk_rope_heads* qk, int dtype, int64_t batch, int64_t seq, int64_t dim, const void* cos,
               const void* sin, int angle_dtype, int64_t angle_batch, int64_t rotary, int inverse,
               int threads);
  void (*cross_entropy)(void* logits, int dtype, int64_t m, int64_t n, int64_t width, const float* bias,
                        const int64_t* labels, const float* row_scale, float softcap, float smoothing,
                        float z_loss, float* loss, int backward, int threads);
  void (*scale_columns)(const void* u, int dtype, int64_t m, int64_t n, const float* scale, const float* bias,
                        void* y, int threads);
  void (*scale_columns_grad)(const void* dy, const void* u, int dtype, int64_t m, int64_t n,
                             const float* scale, void* du, float* d_scale, float* d_bias, int threads);
  void (*dora_norm)(const float* cross, const float* gram, const void* lora_b, int dtype, int64_t n,
                    int64_t r, float scaling, const float* squares, const float* magnitude, float* norm,
                    float* scale, int threads);
  void (*row_squares)(const pk_weight& w, float* squares, int threads);
};

// Rows of a task of the normalization's backward: a function of m alone, so that the order of sums does not
// depend on the threads.
static inline int64_t norm_rows(int64_t m) { return m <= 8 * 64 ? 8 : (m + 63) / 64; }
static inline int64_t norm_tasks(int64_t m) { return (m + norm_rows(m) - 1) / norm_rows(m); }

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512, kernels_avx512bf16, kernels_amx;

}  // namespace pk
