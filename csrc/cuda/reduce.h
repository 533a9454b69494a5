// Sums over the lanes of a warp, in a fixed order.
#pragma once
#include "launch.h"

namespace pk {

// One level of a butterfly over the lanes: of 2 * COUNT values each lane keeps COUNT and gives its partner
// the others; of one value, both add.
template <int COUNT, int BY, int V>
__device__ __forceinline__ void reduce_levels(float (&v)[V], int lane) {
  if constexpr (BY > 0) {
    if constexpr (COUNT > 0) {
      const bool upper = lane & BY;
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        const float keep = upper ? v[i + COUNT] : v[i], give = upper ? v[i] : v[i + COUNT];
        v[i] = keep + __shfl_xor_sync(0xffffffffu, give, BY);
      }
    } else {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], BY);
    }
    reduce_levels<COUNT / 2, BY / 2>(v, lane);
  }
}

// Sums over the warp of V values at once, V a power of two: lane l gets that of value l * V / 32, in V - 1 +
// log2(32 / V) shuffles for 5 V.
template <int V>
__device__ __forceinline__ float reduce(float (&v)[V], int lane) {
  reduce_levels<V / 2, 16>(v, lane);
  return v[0];
}

}  // namespace pk
