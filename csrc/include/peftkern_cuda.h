/* peftkern on CUDA: the C ABI. No framework, allocation, exceptions or synchronization; every call returns a
 * pk_status or a pk_cuda_status.
 *
 * As peftkern.h, with these differences: all pointers are of device memory, those inside pk_weight and
 * pk_lora too (the structs themselves lie on the host and are read before the call returns); pk_lora.seed is
 * not used, as a seed on a GPU is a device pointer of its own; work is queued on `stream`, a cudaStream_t
 * (NULL: the default stream), of device number `device` (< 0: the current one), and can be captured into a
 * graph. Offsets are 64 bits wide. SPDX-License-Identifier: Apache-2.0 */
#ifndef PEFTKERN_CUDA_H
#define PEFTKERN_CUDA_H
#include "peftkern.h"

#define PEFTKERN_CUDA_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  PK_ERR_CUDA = 64, /* the CUDA runtime refused: pk_cuda_error_text() says why */
  PK_ERR_ARCH = 65  /* this device's architecture lacks what the call needs */
} pk_cuda_status;

/* The words for either enum. */
PK_API const char* pk_cuda_status_string(int status);
/* The runtime's words for this thread's last PK_ERR_CUDA. */
PK_API const char* pk_cuda_error_text(void);
PK_API int pk_cuda_abi_version(void);
/* The newest CUDA the driver supports and the one this library was built with, as 1000 major + 10 minor;
 * driver 0 where there is none. */
PK_API int pk_cuda_versions(int* driver, int* runtime);

/* W[row .. row+rows)[col .. col+cols) of a 4-bit weight -> out, row stride ld_out >= cols elements of
 * `dtype`: dtype(fp32(code) * fp32(absmax)), one rounding. One launch, nested absmax included. Rows of out
 * that start 16-byte aligned, with k and col multiples of 64 (or 32), take the faster path; so do whole rows
 * without gaps, whatever k is. */
PK_API int pk_dequantize_4bit_cuda(const pk_weight* w, int64_t row, int64_t rows, int64_t col, int64_t cols,
                                   void* out, int64_t ld_out, int dtype, void* stream, int device);

/* w [numel] of `dtype` -> packed uint8 [(numel+1)/2], absmax fp32 [ceil(numel/blocksize)]; nearest code, a
 * tie to the lower, NaN to 0. */
PK_API int pk_quantize_4bit_cuda(const void* w, int dtype, int64_t numel, int32_t blocksize,
                                 const float* code /* [16] */, uint8_t* packed, float* absmax, void* stream,
                                 int device);

/* absmax fp32 [count] -> absmax_8bit uint8 [count], nested_absmax fp32 [ceil(count/blocksize)]; code fp32
 * [256], ascending. */
PK_API int pk_quantize_absmax_cuda(const float* absmax, int64_t count, int32_t blocksize, const float* code,
                                   uint8_t* absmax_8bit, float* nested_absmax, void* stream, int device);

/* xa fp32 [m, r] = drop(x) A^T; x [m, k] of `dtype`; lora: lora_a, r, dtype and dropout_threshold; seed int64
 * [1], of the device, may be NULL where the threshold is 0. Mask: see pk_dropout_mask_cpu. */
PK_API int pk_xa_cuda(const pk_lora* lora, const int64_t* seed, const void* x, int dtype, int64_t m,
                      int64_t k, float* xa, void* stream, int device);

/* y [m, n] = x [m, k] W^T + scaling * xa B^T + bias [n], one launch, m <= 64, meant for m <= 16; x, y of
 * `dtype`. lora (NULL or r = 0: no low-rank part): lora_b, r, dtype and scaling; xa fp32 [m, r], as
 * pk_xa_cuda makes it. Codes, absmax and products are fp32. A k that is a multiple of 32, with x and the
 * packed weight at multiples of 16 bytes, takes the faster path. */
PK_API int pk_gemv_4bit_cuda(const pk_weight* w, const pk_lora* lora, const void* x, int dtype, int64_t m,
                             const void* bias, int bias_dtype, const float* xa, void* y, void* stream,
                             int device);

/* Whether pk_mma_4bit_cuda takes these: dtype bf16 or fp16, k a multiple of 64, blocksize >= 64, capability
 * (10 major + minor) >= 80. A pure function. */
PK_API int pk_mma_4bit_supported(int dtype, int64_t n, int64_t k, int32_t blocksize, int capability);

/* The same product on tensor cores, meant for 16 < m <= 256, any m: codes in x's dtype, each block's fp32 sum
 * times its absmax. x and the packed weight at multiples of 16 bytes. PK_ERR_ARCH where pk_mma_4bit_supported
 * says no. */
PK_API int pk_mma_4bit_cuda(const pk_weight* w, const pk_lora* lora, const void* x, int dtype, int64_t m,
                            const void* bias, int bias_dtype, const float* xa, void* y, void* stream,
                            int device);

#ifdef __cplusplus
}
#endif
#endif
