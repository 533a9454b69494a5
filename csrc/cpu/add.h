// A sum of two tensors, rounded once: a residual addition in a list of calls.
#pragma once
#include "ops.h"

namespace pk {

struct Add {
  const void *x, *y;
  int dtype;
  int64_t count;
  void* sum;  // may be x or y
};

}  // namespace pk

#if defined(PK_NS)  // the kernel, compiled once a level
#include "vectors.h"

namespace PK_NS {

constexpr int64_t ADD_PIECE = 2048;        // elements of a task. Not measured.
constexpr int64_t ADD_PARALLEL = 1 << 14;  // elements from which a parallel region pays. Not measured.

template <typename T>
static inline void add_row(const T* x, const T* y, int64_t n, T* sum) {
  by_vectors<vf4>(0, n,
                  [&](int64_t i, auto some) { some.store(sum + i, some.load(x + i) + some.load(y + i)); });
}

static void add(const pk::Add& of, int threads) {
  by_dtype(of.dtype, [&](auto value) {
    using T = decltype(value);
#pragma omp parallel for schedule(static) num_threads(threads) if (of.count >= ADD_PARALLEL)
    for (int64_t i = 0; i < of.count; i += ADD_PIECE) {
      const int64_t n = ADD_PIECE < of.count - i ? ADD_PIECE : of.count - i;
      add_row((const T*)of.x + i, (const T*)of.y + i, n, (T*)of.sum + i);
    }
  });
}

}  // namespace PK_NS

#else  // the C function, compiled once, in dispatch.cpp
#include "entry.h"

extern "C" {

int pk_add_cpu(const void* x, const void* y, int dtype, int64_t count, void* sum, int threads) {
  if (!pk::matrix(count, 1)) return PK_ERR_SHAPE;
  if (pk::bad_dtype(dtype)) return PK_ERR_DTYPE;
  if (count == 0) return PK_OK;
  if (!x || !y || !sum) return PK_ERR_NULL;
  current->add({x, y, dtype, count, sum}, threads_or_default(threads));
  return PK_OK;
}

}  // extern "C"
#endif
