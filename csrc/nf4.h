// The one C++ home of the 4-bit formats: nibble order and the nested absmax. Plain scalar code, the same on
// every level.
#pragma once
#include <stdint.h>

#include "include/peftkern.h"

namespace pk {

// The first element of a byte is in the high nibble.
static inline int nibble(const uint8_t* packed, int64_t i) {
  return i & 1 ? packed[i >> 1] & 15 : packed[i >> 1] >> 4;
}

// The fp32 absmax of a block. Multiply and add are rounded separately: this file is compiled with
// -ffp-contract=off.
static inline float absmax_of(const pk_weight& w, int64_t block) {
  if (w.absmax) return w.absmax[block];
  float scaled = w.absmax_code[w.absmax_8bit[block]] *
                 w.nested_absmax[block >> __builtin_ctz((unsigned)w.nested_blocksize)];
  return scaled + *w.absmax_offset;
}

}  // namespace pk
