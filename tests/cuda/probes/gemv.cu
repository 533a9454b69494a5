// The GEMV as on a device with any number of processors and any shared memory, and where a lane finds x, for
// tests/cuda/test_gemv.py.
#include "../../../csrc/cuda/gemv.cu"

extern "C" {
// The C function with the device's limits as arguments; `tokens` rows of x at a time: 1, 2, 4 or 8.
PK_API int probe_gemv(const pk_weight* w, const pk_lora* lora, const void* x, int dtype, int64_t m,
                      const void* bias, int bias_dtype, const float* xa, void* y, int tokens, int processors,
                      int shared_bytes) {
  Linear a;
  if (const int bad = check_linear(w, lora, x, dtype, m, bias, bias_dtype, xa, y, &a)) return bad;
  if (tokens == 1) return launch_gemv<1>(a, processors, shared_bytes, nullptr);
  if (tokens == 2) return launch_gemv<2>(a, processors, shared_bytes, nullptr);
  if (tokens == 4) return launch_gemv<4>(a, processors, shared_bytes, nullptr);
  return launch_gemv<8>(a, processors, shared_bytes, nullptr);
}
PK_API int probe_swizzled(int lane, int j) { return swizzled(lane, j); }
PK_API int probe_fixed_shared() { return FIXED_SHARED; }
}
