// What one ISA's translation unit offers to the dispatcher.
#pragma once
#include "group.h"

namespace pk {

// Operands of a call as the C ABI has them, checked.

// y = x W^T + scaling * (x A^T) B^T + bias for few rows.
struct FewRows {
  const pk_weight& w;
  const pk_lora& lora;
  const void* x;  // [m, k] of `dtype`
  int dtype;
  int64_t m;
  const void* bias;  // [n] of `bias_dtype`, or null
  int bias_dtype;
  void* y;    // [m, n] of `dtype`
  float* xa;  // [m, r]
  float* scratch;
};

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

struct CrossEntropy {
  void* logits;  // [m, n] of `dtype`, in slices of `width` columns
  int dtype;
  int64_t m, n, width;
  const float* bias;       // [n], or null
  const int64_t* labels;   // [m]
  const float* row_scale;  // [m], or null
  float softcap, smoothing, z_loss;
  float* loss;  // [m]
  bool gradient;
};

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
  void (*gemv)(const FewRows& operands, int threads);
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
  void (*rope)(const Rope& operands, int threads);
  void (*cross_entropy)(const CrossEntropy& operands, int threads);
  void (*scale_columns)(const void* u, int dtype, int64_t m, int64_t n, const float* scale, const float* bias,
                        void* y, int threads);
  void (*scale_columns_grad)(const void* dy, const void* u, int dtype, int64_t m, int64_t n,
                             const float* scale, void* du, float* d_scale, float* d_bias, int threads);
  void (*dora_norm)(const DoraNorm& operands, int threads);
  void (*row_squares)(const pk_weight& w, float* squares, int threads);
  // Null where the level has no bf16 products.
  void (*attention)(const pk_attention& a, const pk_heads& y, float* lse, float* scratch, int threads);
  void (*attention_grad)(const pk_attention& a, const pk_attention_grad& grad, const float* lse,
                         float* scratch, int threads);
};

// Rows of a task of the normalization's backward: a function of m alone, so that the order of sums does not
// depend on the threads.
static inline int64_t norm_rows(int64_t m) { return m <= 8 * 64 ? 8 : (m + 63) / 64; }
static inline int64_t norm_tasks(int64_t m) { return (m + norm_rows(m) - 1) / norm_rows(m); }

}  // namespace pk
