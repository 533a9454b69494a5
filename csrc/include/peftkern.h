/* peftkern: the C ABI. No framework, no allocation, no exceptions; every call returns a pk_status.
 *
 * Sizes are in elements unless they say bytes. Matrices are row-major. `threads` <= 0 takes OpenMP's current
 * number; at most 4096 are used. The caller owns every buffer; inputs are never written. Names: x, y, dy, dx
 * activations and gradients; M tokens, N out_features, K in_features, R rank. SPDX-License-Identifier:
 * Apache-2.0
 *
 * Alignment: a buffer of a dtype lies at a multiple of that dtype's size; scratch may begin at any byte.
 * Sizes: an operand has at most 2^47 elements, and the adapters of a group have at most 2^20 ranks together:
 * what is larger, or negative, is PK_ERR_SHAPE, and pk_*_scratch_bytes is 0. M = 0 and N = 0 are nothing to
 * do in every forward function (PK_OK; a buffer without elements may be NULL, a weight may not); K = 0 is
 * PK_ERR_SHAPE, and so are M = 0 and N = 0 in the linears' backward functions, whose results the caller then
 * knows: zeros. */
#ifndef PEFTKERN_H
#define PEFTKERN_H
#include <stddef.h>
#include <stdint.h>

#define PEFTKERN_ABI_VERSION 14

#if defined(__GNUC__)
#define PK_API __attribute__((visibility("default")))
#else
#define PK_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  PK_OK = 0,
  PK_ERR_NULL = 1,      /* a required pointer is null */
  PK_ERR_SHAPE = 2,     /* a size is negative, zero where it may not be, or out of range */
  PK_ERR_DTYPE = 3,     /* not a pk_dtype */
  PK_ERR_BLOCKSIZE = 4, /* not a power of two from 32 to 4096; of a nested one: no power of two */
  PK_ERR_SCRATCH = 5,   /* scratch is smaller than pk_*_scratch_bytes says */
  PK_ERR_ISA = 6        /* the ISA is unknown or this CPU lacks it */
} pk_status;

typedef enum { PK_F32 = 0, PK_BF16 = 1, PK_F16 = 2 } pk_dtype;

/* A frozen weight [n, k]: 4-bit (code != NULL) or dense (code == NULL: `data` holds n*k of `dtype`). */
typedef struct {
  const void* data;           /* 4-bit: uint8 [(n*k+1)/2], first element in the high nibble */
  const float* code;          /* [16], or NULL */
  const float* absmax;        /* [ceil(n*k/blocksize)], or NULL where the absmax is nested */
  const uint8_t* absmax_8bit; /* nested: [ceil(n*k/blocksize)] */
  const float* absmax_code;   /* nested: [256] */
  const float* nested_absmax; /* nested: [ceil(blocks/nested_blocksize)] */
  const float* absmax_offset; /* nested: [1] */
  int64_t n, k;
  int32_t blocksize, nested_blocksize;
  int32_t dtype; /* of a dense weight */
} pk_weight;

/* The low-rank branch; all zero where there is none. */
typedef struct {
  const void* lora_a; /* [r, k] of `dtype` */
  const void* lora_b; /* [n, r] of `dtype` */
  int64_t r;          /* 1 ... 256 */
  int32_t dtype;
  float scaling;
  uint32_t dropout_threshold; /* round(p * 65536); 0: no dropout. Mask: see pk_dropout_mask_cpu */
  uint64_t seed;
} pk_lora;

PK_API const char* pk_status_string(int status);
PK_API int pk_abi_version(void);

/* The ISA level in use ("baseline", "avx2", "avx512", "avx512bf16", "amx"), and the levels this CPU has,
 * lowest first: pk_isa_name(0), (1), ... NULL. */
PK_API const char* pk_isa(void);
PK_API const char* pk_isa_name(int i);
/* Force a level; PK_ERR_ISA where this CPU lacks it. Not to be called while kernels run. The variable
 * PEFTKERN_CPU_ISA does it at load. */
PK_API int pk_set_isa(const char* name);

/* Whether the threads' cores have a cache in common decides how they share a product in bf16 tiles; the bits
 * are the same. By default it is measured, again and again, as virtual cores are moved; not to be set while
 * kernels run. PK_ERR_SHAPE for another number. */
enum { PK_CORES_MEASURED = 0, PK_CORES_TOGETHER = 1, PK_CORES_APART = 2 };
PK_API int pk_set_cores(int how);
/* Measured now, between the first and the last of `threads`: ns of a round trip of a cache line; 0 for one
 * thread, or where the other does not answer. */
PK_API int64_t pk_core_distance(int threads);

/* w [numel] of `dtype` -> packed uint8 [(numel+1)/2], absmax fp32 [ceil(numel/blocksize)]; nearest code, a
 * tie to the lower, NaN to 0. */
PK_API int pk_quantize_4bit_cpu(const void* w, int dtype, int64_t numel, int32_t blocksize,
                                const float* code /* [16] */, uint8_t* packed, float* absmax, int threads);

/* absmax fp32 [count] -> absmax_8bit uint8 [count], nested_absmax fp32 [ceil(count/blocksize)]; code fp32
 * [256], ascending. */
PK_API int pk_quantize_absmax_cpu(const float* absmax, int64_t count, int32_t blocksize, const float* code,
                                  uint8_t* absmax_8bit, float* nested_absmax, int threads);

/* W[row .. row+rows)[col .. col+cols) of a 4-bit weight -> out [rows, cols] of `dtype`: dtype(fp32(code) *
 * fp32(absmax)), one rounding. */
PK_API int pk_dequantize_4bit_cpu(const pk_weight* w, int64_t row, int64_t rows, int64_t col, int64_t cols,
                                  void* out, int dtype, int threads);

/* Bytes of scratch that pk_qlora_linear_{fwd,bwd}_cpu need for these sizes; bounded, independent of m beyond
 * one block of rows. */
PK_API int64_t pk_qlora_linear_scratch_bytes(int64_t m, int64_t n, int64_t k, int64_t r, int threads);

/* y [m, n] = x [m, k] W^T + scaling * drop(x) A^T B^T + bias [n]; x, y of `dtype`. xa fp32 [m, r] = drop(x)
 * A^T. gemv != 0 takes the kernel for few rows (m <= 64), which decodes in registers. */
PK_API int pk_qlora_linear_fwd_cpu(const pk_weight* w, const pk_lora* lora, const void* x, int dtype,
                                   int64_t m, const void* bias, int bias_dtype, void* y, float* xa, int gemv,
                                   void* scratch, int64_t scratch_bytes, int threads);

/* dy [m, n] -> dx [m, k] = dy W + drop(dyb A); d_lora_a [r, k] = dyb^T drop(x); d_lora_b [n, r] = scaling *
 * dy^T xa; d_bias fp32 [n]. Any of dx, d_lora_a, d_lora_b, d_bias may be NULL. dyb fp32 [m, r] is workspace
 * for scaling * dy B. d_lora_* are of lora->dtype. */
PK_API int pk_qlora_linear_bwd_cpu(const pk_weight* w, const pk_lora* lora, const void* dy, const void* x,
                                   int dtype, int64_t m, const float* xa, float* dyb, void* dx,
                                   void* d_lora_a, void* d_lora_b, float* d_bias, void* scratch,
                                   int64_t scratch_bytes, int threads);

/* Bytes of scratch that pk_lora_{fwd,bwd}_cpu need: less, as nothing is decoded. */
PK_API int64_t pk_lora_scratch_bytes(int64_t m, int64_t n, int64_t k, int64_t r, int threads);

/* The low-rank parts alone, for callers that leave the base product to a vendor GEMM:
 * fwd: xa = drop(x) A^T and y += scaling * xa B^T + bias. */
PK_API int pk_lora_fwd_cpu(const pk_lora* lora, const void* x, int dtype, int64_t m, int64_t n, int64_t k,
                           const void* bias, int bias_dtype, void* y, float* xa, void* scratch,
                           int64_t scratch_bytes, int threads);
/* Of a backward pass: dy [m, n], xa as the forward pass gave it, dyb as workspace, and what is wanted. */
typedef struct {
  const void* dy;
  const float* xa;
  float* dyb;
  void* dx;
  void* d_lora_a;
  void* d_lora_b;
  float* d_bias;
} pk_lora_grad;
/* bwd: as pk_qlora_linear_bwd_cpu, but dx += drop(dyb A). */
PK_API int pk_lora_bwd_cpu(const pk_lora* lora, const pk_lora_grad* grad, const void* x, int dtype, int64_t m,
                           int64_t n, int64_t k, void* scratch, int64_t scratch_bytes, int threads);

/* Linears that share their input x [m, k] (q, k, v; gate, up; one linear with several adapters; a batch of
 * mixed adapters): one read of x, one dx. The single linear's functions above are a group of one. */

/* A member: y = x W^T + its adapters + bias. weight.data == NULL (in all members or in none): no base
 * product, y and dx are added to. */
typedef struct {
  pk_weight weight;
  const void* bias; /* [n] of bias_dtype, or NULL */
  int32_t bias_dtype;
  void* y;        /* forward: [m, n] */
  const void* dy; /* backward: [m, n] */
  float* d_bias;  /* backward: [n], or NULL */
  /* DoRA, with base products only: */
  float* scale; /* [n], or NULL: y = scale * (x W^T + its adapters) + bias by columns */
  void* u;      /* with scale: [m, n], what is scaled, written forward and read for d_scale, or NULL */
  float* norm;  /* forward: [n] = ||W + scaling B A|| by rows, of its only adapter, whose r is not 0; scale =
                   magnitude / norm is then written too (nothing is where m is 0). NULL: scale is read */
  const float* squares;   /* with norm: [n] = ||W||^2 by rows */
  const float* magnitude; /* with norm: [n] */
  float* d_scale;         /* backward: [n] = sum over rows of dy * u, or NULL */
} pk_member;

/* An adapter of member number `member`, applied to rows [row_begin, row_end) of x alone. Those of one member
 * that share rows add up. */
typedef struct {
  pk_lora lora; /* row 0 of its dropout mask is row_begin of x */
  int64_t member, row_begin, row_end;
  float* xa;      /* [row_end - row_begin, r] = drop(x) A^T: written forward, read for d_lora_b */
  float* dyb;     /* [row_end - row_begin, r]: workspace backward, wanted where d_lora_a is */
  void* d_lora_a; /* backward: of lora.dtype, or NULL */
  void* d_lora_b;
} pk_adapter;

/* Bytes of scratch that either direction needs. */
PK_API int64_t pk_qlora_group_scratch_bytes(const pk_member* members, int64_t count,
                                            const pk_adapter* adapters, int64_t adapter_count, int64_t m,
                                            int threads);
PK_API int pk_qlora_group_fwd_cpu(const pk_member* members, int64_t count, const pk_adapter* adapters,
                                  int64_t adapter_count, const void* x, int dtype, int64_t m, void* scratch,
                                  int64_t scratch_bytes, int threads);
/* dx [m, k] = sum over members of dy W + drop(dyb A), or NULL; x may be NULL where no d_lora_a is wanted. */
PK_API int pk_qlora_group_bwd_cpu(const pk_member* members, int64_t count, const pk_adapter* adapters,
                                  int64_t adapter_count, const void* x, int dtype, int64_t m, void* dx,
                                  void* scratch, int64_t scratch_bytes, int threads);

/* The dropout mask times 1/(1-p), fp32 [m, k]: element (i, j) is the (j % 8)-th 16-bit half of Philox4x32-10
 * at counter (j/8, i, 0, 0). */
PK_API int pk_dropout_mask_cpu(int64_t m, int64_t k, uint32_t threshold, uint64_t seed, float* mask,
                               int threads);

/* sum [count] = x + y, all of `dtype`, rounded once; sum may be x or y. */
PK_API int pk_add_cpu(const void* x, const void* y, int dtype, int64_t count, void* sum, int threads);

typedef enum { PK_SILU = 0, PK_GELU = 1 /* exact */, PK_GELU_TANH = 2 } pk_activation;

/* The operands of a gated linear unit, [m, n]; ld_*: elements from a row to the next, so that the two may be
 * halves of one matrix. */
typedef struct {
  const void* gate;
  const void* up;
  int64_t ld_gate, ld_up;
} pk_glu;

typedef struct {
  void* d_gate;
  void* d_up;
  int64_t ld_d_gate, ld_d_up;
} pk_glu_grad;

/* h [m, n] = act(gate) * up, all of `dtype`, fp32 inside, rounded once. */
PK_API int pk_glu_fwd_cpu(const pk_glu* operands, int dtype, int64_t m, int64_t n, int activation, void* h,
                          int threads);
/* dy [m, n] -> d_gate = dy * up * act'(gate), d_up = dy * act(gate); h is computed again where it is not
 * NULL. */
PK_API int pk_glu_bwd_cpu(const pk_glu* operands, const pk_glu_grad* grads, int dtype, int64_t m, int64_t n,
                          int activation, const void* dy, void* h, int threads);

/* How a normalized row meets the weight. PK_CAST_LLAMA: weight * T(x^), x^ rounded to x's dtype T first, y of
 * the promoted dtype. PK_CAST_GEMMA: T(x^ * (offset + weight)), all in fp32. */
typedef enum { PK_CAST_LLAMA = 0, PK_CAST_GEMMA = 1 } pk_cast;

typedef struct {
  const void* x;      /* [m, n] of `dtype`, rows ld_x apart */
  const void* weight; /* [n] of `weight_dtype` */
  int64_t m, n, ld_x;
  int32_t dtype, weight_dtype;
  int32_t y_dtype; /* of y and dy: `dtype`, or PK_F32 */
  int32_t cast;
  float eps, offset; /* offset: of PK_CAST_GEMMA */
} pk_rms_norm;

PK_API int64_t pk_rms_norm_scratch_bytes(int64_t m, int64_t n, int with_d_weight);
/* y [m, n] = norm(x) with the weight; rstd fp32 [m] = 1 / sqrt(mean(x^2) + eps). */
PK_API int pk_rms_norm_fwd_cpu(const pk_rms_norm* norm, void* y, float* rstd, void* scratch,
                               int64_t scratch_bytes, int threads);
/* dy [m, n] -> dx [m, n] of `dtype`, d_weight fp32 [n]; either may be NULL. */
PK_API int pk_rms_norm_bwd_cpu(const pk_rms_norm* norm, const void* dy, const float* rstd, void* dx,
                               float* d_weight, void* scratch, int64_t scratch_bytes, int threads);

/* Heads [batch, heads, seq, dim] before and after a rotation, in elements from one index to the next; the
 * last dimension is contiguous. */
typedef struct {
  const void* x;
  void* y;
  int64_t heads;
  int64_t x_batch, x_head, x_seq;
  int64_t y_batch, y_head, y_seq;
} pk_rope_heads;

/* Rotary position embedding in the rotate_half convention of q and k together (k->heads may be 0), of
 * `dtype`, with cos and sin [batch or 1, seq, rotary] of `angle_dtype`, contiguous but for angle_batch (0:
 * one for all); rotary <= dim, even; the rest is copied. inverse != 0: the transposed map, which is its
 * gradient. */
PK_API int pk_rope_cpu(const pk_rope_heads* q, const pk_rope_heads* k, int dtype, int64_t batch, int64_t seq,
                       int64_t dim, const void* cos, const void* sin, int angle_dtype, int64_t angle_batch,
                       int64_t rotary, int inverse, int threads);

/* Cross-entropy of m rows of n logits, u, of `dtype`, which lie in slices of `width` columns one behind the
 * other, each [m, width], the last one narrower (width >= n: simply [m, n]). l = u + bias [n], or softcap *
 * tanh((u + bias) / softcap) where softcap > 0; loss fp32 [m] = lse - (1 - label_smoothing) l[label] -
 * label_smoothing mean(l) + z_loss lse^2, with 0 <= labels [m] < n. gradient != 0: u becomes row_scale [m] *
 * d loss / d u. bias, row_scale fp32, may be NULL. */
PK_API int pk_cross_entropy_cpu(void* logits, int dtype, int64_t m, int64_t n, int64_t width,
                                const float* bias, const int64_t* labels, const float* row_scale,
                                float softcap, float label_smoothing, float z_loss, float* loss, int gradient,
                                int threads);

/* y [m, n] = u * scale [n] + bias [n] (NULL: none), u and y of `dtype`, the rest fp32: DoRA's magnitude over
 * norm. */
PK_API int pk_scale_columns_fwd_cpu(const void* u, int dtype, int64_t m, int64_t n, const float* scale,
                                    const float* bias, void* y, int threads);
/* dy [m, n] -> du = dy * scale, d_scale [n] = sum over rows of dy * u, d_bias [n] = sum of dy; any of the
 * three may be NULL. */
PK_API int pk_scale_columns_bwd_cpu(const void* dy, const void* u, int dtype, int64_t m, int64_t n,
                                    const float* scale, void* du, float* d_scale, float* d_bias, int threads);

/* Asks the system for huge pages behind a buffer that nothing has written to yet; a hint, PK_OK also where
 * the system has none. For buffers mapped by themselves (from 32 MiB on, glibc's malloc does so): the wish
 * ends with the mapping. */
PK_API int pk_advise_huge_pages(void* data, int64_t bytes);

/* RMSNorm of a sum, which is kept: s [m, n] = x + residual, rounded to `dtype`; y = norm(s) with the weight;
 * rstd of s. residual and s lie contiguous, of `dtype`. Scratch as pk_rms_norm_scratch_bytes says. */
PK_API int pk_add_rms_norm_fwd_cpu(const pk_rms_norm* norm, const void* residual, void* s, void* y,
                                   float* rstd, void* scratch, int64_t scratch_bytes, int threads);
/* norm->x is s. dy [m, n] and ds [m, n] of `dtype`, the gradients of y and of s -> d_sum [m, n] = the norm's
 * gradient + ds, rounded once, which is x's and residual's; d_weight fp32 [n], or NULL. */
PK_API int pk_add_rms_norm_bwd_cpu(const pk_rms_norm* norm, const void* dy, const void* ds, const float* rstd,
                                   void* d_sum, float* d_weight, void* scratch, int64_t scratch_bytes,
                                   int threads);

/* DoRA's norm in closed form: norm [n] = ||W + scaling B A|| of each row, from cross [r, n] = A W^T, gram [r,
 * r] = A A^T, lora_b [n, r] of `dtype` and squares [n] = ||W||^2; scale [n] = magnitude / norm. All fp32 but
 * lora_b; r from 1 to 256. */
PK_API int pk_dora_norm_cpu(const float* cross, const float* gram, const void* lora_b, int dtype, int64_t n,
                            int64_t r, float scaling, const float* squares, const float* magnitude,
                            float* norm, float* scale, int threads);

/* squares [n] = ||W||^2 of each row, fp32, of a 4-bit or dense weight; the same bits for any number of
   threads. */
PK_API int pk_row_squares_cpu(const pk_weight* w, float* squares, int threads);

/* Heads [batch, heads, rows, dim] of bf16, in elements from one index to the next; dim is contiguous. */
typedef struct {
  void* data;
  int64_t batch, head, row;
} pk_heads;

/* Softmax attention: query i of a head sees key j of its head of keys where j <= i (`causal`, seq == keys
 * then) and mask [batch or 1, seq, keys] has a byte that is not 0. dim from 1 to 256; heads a multiple of
 * kv_heads; scale > 0. A query that sees no key gives 0. */
typedef struct {
  pk_heads q, k, v;
  int64_t batch, heads, kv_heads, seq, keys, dim;
  float scale;
  int32_t causal;
  const uint8_t* mask; /* or NULL; its keys are contiguous */
  int64_t mask_batch, mask_row;
} pk_attention;

typedef struct {
  pk_heads y, dy;      /* y as the forward pass gave it */
  pk_heads dq, dk, dv; /* written */
} pk_attention_grad;

/* Whether the level in use has the kernel: bf16 products. */
PK_API int pk_attention_served(void);
/* Bytes of scratch of a pass; 0 for sizes that no call takes. */
PK_API int64_t pk_attention_scratch_bytes(const pk_attention* a, int backward, int threads);
/* y of q's sizes; lse fp32 [batch, heads, seq], the logarithm of the sum of exp(scale * scores). */
PK_API int pk_attention_fwd_cpu(const pk_attention* a, const pk_heads* y, float* lse, void* scratch,
                                int64_t scratch_bytes, int threads);
PK_API int pk_attention_bwd_cpu(const pk_attention* a, const pk_attention_grad* grad, const float* lse,
                                void* scratch, int64_t scratch_bytes, int threads);

/* Bytes of scratch; 0 for sizes that no call takes. */
PK_API int64_t pk_linear_cross_entropy_scratch_bytes(int64_t m, int64_t n, int64_t k, int gradient,
                                                     int threads);
/* Cross-entropy of the logits l = x w^T, which never exist: loss fp32 [m] = lse - l[label] + z_loss lse^2,
 * with 0 <= labels [m] < n, and dx [m, k] = row_scale [m] * d loss / dx (NULL: none). x and dx are bf16, w is
 * bf16, or 4-bit of blocks of 64 or more in rows of whole blocks (PK_ERR_BLOCKSIZE else); row_scale may be
 * NULL. PK_ERR_ISA where the level in use has no bf16 products. */
PK_API int pk_linear_cross_entropy_cpu(const pk_weight* w, const void* x, int64_t m, const int64_t* labels,
                                       const float* row_scale, float z_loss, float* loss, void* dx,
                                       void* scratch, int64_t scratch_bytes, int threads);

#ifdef __cplusplus
}
#endif
#endif
