// What a call is refused for before a kernel sees it, on the CPU and on GPUs alike, and the words for it.
// Plain arithmetic that overflows nowhere, whatever it is given.
#pragma once
#include "formats.h"

namespace pk {

// Elements of an operand: more do not fit into 47 bits of addresses, which is what a process has. Every
// offset, and every sum of them for scratch, then fits into 64 bits.
constexpr int64_t MOST_ELEMENTS = (int64_t)1 << 47;
constexpr int64_t MOST_RANK = 256;  // of an adapter

// The words for a pk_status.
static inline const char* status_text(int status) {
  static const char* const TEXT[] = {"ok",
                                     "a required pointer is null",
                                     "a size is out of range",
                                     "unknown dtype",
                                     "block size is not a power of two from 32 to 4096",
                                     "scratch is too small",
                                     "unknown or unsupported ISA"};
  return status >= 0 && status <= PK_ERR_ISA ? TEXT[status] : "unknown status";
}

static inline bool bad_dtype(int dtype) { return dtype != PK_F32 && dtype != PK_BF16 && dtype != PK_F16; }
static inline bool bad_rank(int64_t r) { return r < 0 || r > MOST_RANK; }

// A block size that is no power of two within a format's bounds.
static inline bool bad_power(int64_t size, int64_t least, int64_t most) {
  return size < least || size > most || (size & (size - 1));
}
static inline bool bad_block(int64_t size) { return bad_power(size, LEAST_BLOCK, MOST_BLOCK); }
static inline bool bad_nested_block(int64_t size) { return bad_power(size, LEAST_NESTED, MOST_NESTED); }

// Whether [rows, cols] is a matrix that can exist; either may be 0.
static inline bool matrix(int64_t rows, int64_t cols) {
  if (rows < 0 || cols < 0 || rows > MOST_ELEMENTS || cols > MOST_ELEMENTS) return false;
  return cols == 0 || rows <= MOST_ELEMENTS / cols;
}

// Of a 4-bit or a dense weight.
static inline int check_weight(const pk_weight* w) {
  if (!w || !w->data) return PK_ERR_NULL;
  if (w->k < 1 || !matrix(w->n, w->k)) return PK_ERR_SHAPE;
  if (!w->code) return bad_dtype(w->dtype) ? PK_ERR_DTYPE : PK_OK;
  if (bad_block(w->blocksize)) return PK_ERR_BLOCKSIZE;
  if (w->absmax) return PK_OK;
  if (!w->absmax_8bit || !w->absmax_code || !w->nested_absmax || !w->absmax_offset) return PK_ERR_NULL;
  return bad_nested_block(w->nested_blocksize) ? PK_ERR_BLOCKSIZE : PK_OK;
}

static inline int check_4bit_weight(const pk_weight* w) {
  return w && !w->code ? PK_ERR_NULL : check_weight(w);
}

// Of a window [rows, cols] of a 4-bit weight that is decoded to `dtype`, rows of out `ld_out` elements apart.
static inline int check_window(const pk_weight* w, int64_t row, int64_t rows, int64_t col, int64_t cols,
                               const void* out, int64_t ld_out, int dtype) {
  if (int bad = check_4bit_weight(w)) return bad;
  if (row < 0 || rows < 0 || rows > w->n - row || col < 0 || cols < 0 || cols > w->k - col || ld_out < cols)
    return PK_ERR_SHAPE;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  return rows && cols && !out ? PK_ERR_NULL : PK_OK;
}

static inline int check_quantize(const void* w, int dtype, int64_t numel, int32_t blocksize,
                                 const float* code, const uint8_t* packed, const float* absmax) {
  if (!w || !code || !packed || !absmax) return PK_ERR_NULL;
  if (numel < 1 || !matrix(numel, 1)) return PK_ERR_SHAPE;
  if (bad_dtype(dtype)) return PK_ERR_DTYPE;
  return bad_block(blocksize) ? PK_ERR_BLOCKSIZE : PK_OK;
}

static inline int check_quantize_absmax(const float* absmax, int64_t count, int32_t blocksize,
                                        const float* code, const uint8_t* out, const float* nested) {
  if (!absmax || !code || !out || !nested) return PK_ERR_NULL;
  if (count < 1 || !matrix(count, 1)) return PK_ERR_SHAPE;
  return bad_nested_block(blocksize) ? PK_ERR_BLOCKSIZE : PK_OK;
}

}  // namespace pk
