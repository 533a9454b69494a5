// ||w||^2 of each row of a weight, 4-bit or dense: a piece of the row is decoded into the first-level cache
// and squared there, so that no more than its bytes are read from memory.
#pragma once
#include "ops.h"

namespace pk {

struct RowSquares {
  const pk_weight& w;
  float* squares;  // [n]
};

}  // namespace pk

#if defined(PK_NS)  // the kernel, compiled once a level
#include "decode_impl.h"

namespace PK_NS {

constexpr int64_t SQUARED = 2048;  // elements of a piece: 8 KB
constexpr int SQUARE_CHAINS = 4;   // sums side by side, or the additions wait for one another

// The order of a row's sum depends on k alone: a decoded weight has the squares of the 4-bit one, whatever
// its blocks and the threads are.
static float row_square(const pk_weight& w, const Table& table, int64_t row) {
  alignas(64) float piece[SQUARED + SQUARE_CHAINS * VW];
  vf total{};
  for (int64_t from = 0; from < w.k; from += SQUARED) {
    const int64_t count = w.k - from < SQUARED ? w.k - from : SQUARED;
    decode(w, table, row * w.k + from, count, piece);
    for (int c = 0; c < SQUARE_CHAINS; c++) store(piece + count + c * VW, vf{});
    // Of the piece alone: a long row's sum is one of short ones, whose roundings are smaller.
    vf sums[SQUARE_CHAINS] = {};
    for (int64_t i = 0; i < count; i += SQUARE_CHAINS * VW)
      for (int c = 0; c < SQUARE_CHAINS; c++) {
        const vf v = load(piece + i + c * VW);
        sums[c] = fma(v, v, sums[c]);
      }
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  return sum(total);
}

static void row_squares(const pk::RowSquares& of, int threads) {
  const pk_weight& w = of.w;
  const Table table = w.code ? make_table(w.code) : Table{};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < w.n; row++) of.squares[row] = row_square(w, table, row);
}

}  // namespace PK_NS

#else  // the C function, compiled once, in dispatch.cpp
#include "entry.h"

extern "C" {

int pk_row_squares_cpu(const pk_weight* w, float* squares, int threads) {
  if (int bad = check_weight(w)) return bad;
  if (w->n && !squares) return PK_ERR_NULL;
  current->row_squares({*w, squares}, threads_or_default(threads));
  return PK_OK;
}

}  // extern "C"
#endif
