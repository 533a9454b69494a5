// The tensor-core kernel's layouts, and its tiles by choice, for tests/cuda/test_mma.py.
#include "../../../csrc/cuda/mma.cu"

extern "C" {
// The C function with a tile of 8 * nt rows of x by 32 * wm rows of W.
PK_API int probe_mma(const pk_weight* w, const pk_lora* lora, const void* x, int dtype, int64_t m,
                     const void* bias, int bias_dtype, const float* xa, void* y, int nt, int wm) {
  Linear a;
  if (const int bad = check_linear(w, lora, x, dtype, m, bias, bias_dtype, xa, y, &a)) return bad;
  if (nt == 1) return wm == 1 ? launch_tiles<1, 1>(a, nullptr) : launch_tiles<1, 2>(a, nullptr);
  if (nt == 2) return wm == 1 ? launch_tiles<2, 1>(a, nullptr) : launch_tiles<2, 2>(a, nullptr);
  if (nt == 4) return wm == 1 ? launch_tiles<4, 1>(a, nullptr) : launch_tiles<4, 2>(a, nullptr);
  return wm == 1 ? launch_tiles<8, 1>(a, nullptr) : launch_tiles<8, 2>(a, nullptr);
}
PK_API int probe_w_chunk(int row, int chunk) { return w_chunk(row, chunk); }
PK_API int probe_x_chunk(int row, int chunk) { return x_chunk(row, chunk); }
PK_API int probe_sum_row(int wm) { return wm == 1 ? Tile<1, 1>::SUM_ROW : Tile<1, 2>::SUM_ROW; }
PK_API int probe_shared_bytes(int nt, int wm) {
  if (nt == 1) return wm == 1 ? Tile<1, 1>::BYTES : Tile<1, 2>::BYTES;
  if (nt == 2) return wm == 1 ? Tile<2, 1>::BYTES : Tile<2, 2>::BYTES;
  if (nt == 4) return wm == 1 ? Tile<4, 1>::BYTES : Tile<4, 2>::BYTES;
  return wm == 1 ? Tile<8, 1>::BYTES : Tile<8, 2>::BYTES;
}
}
