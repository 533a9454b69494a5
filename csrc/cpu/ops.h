// The CPU's ops, a file each: its operands, its kernel for a level, its C function. A new op is a file, and a
// line in each list here.
#pragma once
#include <stdint.h>

// Of a level: a kernel and its operands, as the C functions give them, checked.
#define PK_EACH_KERNEL(KERNEL)                     \
  KERNEL(add, Add)                                 \
  KERNEL(attention, Attention)                     \
  KERNEL(attention_grad, AttentionGrad)            \
  KERNEL(backward, Backward)                       \
  KERNEL(cross_entropy, CrossEntropy)              \
  KERNEL(dequantize, Window)                       \
  KERNEL(dora_norm, DoraNorm)                      \
  KERNEL(dropout_mask, DropoutMask)                \
  KERNEL(forward, Forward)                         \
  KERNEL(gemv, FewRows)                            \
  KERNEL(glu, Glu)                                 \
  KERNEL(linear_cross_entropy, LinearCrossEntropy) \
  KERNEL(quantize, Quantize)                       \
  KERNEL(quantize_absmax, QuantizeAbsmax)          \
  KERNEL(rms_norm, RmsNorm)                        \
  KERNEL(rms_norm_grad, RmsNormGrad)               \
  KERNEL(rope, Rope)                               \
  KERNEL(row_squares, RowSquares)                  \
  KERNEL(scale_columns, ScaleColumns)              \
  KERNEL(scale_columns_grad, ScaleColumnsGrad)

// C functions, pk_NAME_cpu, that Python calls with their arguments as they are.
#define PK_EACH_FUNCTION(FUNCTION) \
  FUNCTION(add)                    \
  FUNCTION(add_rms_norm_bwd)       \
  FUNCTION(add_rms_norm_fwd)       \
  FUNCTION(attention_bwd)          \
  FUNCTION(attention_fwd)          \
  FUNCTION(cross_entropy)          \
  FUNCTION(dequantize_4bit)        \
  FUNCTION(dora_norm)              \
  FUNCTION(linear_cross_entropy)   \
  FUNCTION(quantize_4bit)          \
  FUNCTION(quantize_absmax)        \
  FUNCTION(rms_norm_bwd)           \
  FUNCTION(rms_norm_fwd)           \
  FUNCTION(rope)                   \
  FUNCTION(row_squares)            \
  FUNCTION(scale_columns_bwd)      \
  FUNCTION(scale_columns_fwd)

namespace pk {

#define PK_DECLARED(kernel, Operands) struct Operands;
PK_EACH_KERNEL(PK_DECLARED)
#undef PK_DECLARED

// What one ISA's translation unit offers to the dispatcher. attention, its gradient and
// linear_cross_entropy are null where the level has no bf16 products.
struct Kernels {
  const char* name;
  int lanes;
  bool tiles;  // bf16 products of 4-bit weights are those of tile_impl.h
#define PK_FIELD(kernel, Operands) void (*kernel)(const Operands& operands, int threads);
  PK_EACH_KERNEL(PK_FIELD)
#undef PK_FIELD
};

}  // namespace pk

#if !defined(PK_LISTS_ALONE)
#include "add.h"
#include "attention.h"
#include "cross_entropy.h"
#include "dora_norm.h"
#include "glu.h"
#include "linear.h"
#include "linear_cross_entropy.h"
#include "quantize.h"
#include "rms_norm.h"
#include "rope.h"
#include "row_squares.h"
#include "scale_columns.h"
#endif
