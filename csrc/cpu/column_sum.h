// Sums over the rows of a matrix, a strip of columns at a time.
#pragma once
#include "simd.h"

namespace PK_NS {

// In three levels of short chains (8 rows, 16 of those, all of those): one chain over thousands of rows would
// lose digits. The caller adds row after row to `part` and closes each with the number of rows so far.
struct ColumnSum {
  static constexpr int64_t CHAIN = 8, MIDDLE = 128;
  float total[LANES] = {}, middle[LANES] = {}, part[LANES] = {};
  void close(int64_t end, int64_t m, int64_t width) {
    if (end % CHAIN && end != m) return;
    const bool last = end % MIDDLE == 0 || end == m;
    for (int64_t j = 0; j < width; j++) {
      middle[j] += part[j];
      part[j] = 0;
      if (!last) continue;
      total[j] += middle[j];
      middle[j] = 0;
    }
  }
};

}  // namespace PK_NS
