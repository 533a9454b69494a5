// What both Python modules share. Pointers arrive as integers from checked launchers, which hold the tensors;
// 0 is null.
#pragma once
#include <pybind11/pybind11.h>

#include "include/peftkern.h"

using Address = uintptr_t;

namespace {

template <typename T>
T* at(Address p) {
  return reinterpret_cast<T*>(p);
}

struct Weight : pk_weight {
  Weight(Address data, Address code, Address absmax, Address absmax_8bit, Address absmax_code,
         Address nested_absmax, Address absmax_offset, int64_t n, int64_t k, int blocksize,
         int nested_blocksize, int dtype)
      : pk_weight{at<void>(data),
                  at<float>(code),
                  at<float>(absmax),
                  at<uint8_t>(absmax_8bit),
                  at<float>(absmax_code),
                  at<float>(nested_absmax),
                  at<float>(absmax_offset),
                  n,
                  k,
                  blocksize,
                  nested_blocksize,
                  dtype} {}
};

}  // namespace
