// Quantization: the absmax of each block, then for each element the number of thresholds below it.
#pragma once
#include "ops.h"

namespace pk {

struct Quantize {
  const void* w;  // [numel] of `dtype`
  int dtype;
  int64_t numel;
  int32_t blocksize;
  const float* code;  // [16]
  uint8_t* packed;    // [(numel + 1) / 2]
  float* absmax;      // one a block
};

struct QuantizeAbsmax {
  const float* absmax;  // [count]
  int64_t count;
  int32_t blocksize;
  const float* code;  // [256]
  uint8_t* out;       // [count]
  float* nested;      // one a block
};

}  // namespace pk

#if defined(PK_NS)  // the kernel, compiled once a level
#include "../formats.h"
#include "simd.h"

namespace PK_NS {

template <typename T>
static float block_absmax(const T* w, int64_t count) {
  vf best = vf{};
  int64_t i = 0;
  for (; i + VW <= count; i += VW) {
    vf v = (vf)((vu)loadx(w + i) & 0x7fffffff);
    vi larger = v > best;  // false for NaN, which therefore does not count
    best = (vf)(((vi)v & larger) | ((vi)best & ~larger));
  }
  float lanes[VW], top = 0;
  store(lanes, best);
  for (int l = 0; l < VW; l++) top = lanes[l] > top ? lanes[l] : top;
  for (; i < count; i++) {
    float v = bits_to_float(float_to_bits(to_float(w[i])) & 0x7fffffff);
    top = v > top ? v : top;
  }
  return top;
}

struct Thresholds {
  float value[15];
  int32_t code[17];  // rank -> code index; rank 16 stands for NaN, which is index 0
};

static Thresholds make_thresholds(const float* code) {
  Thresholds t{};
  for (int i = 0; i < pk::CODES; i++) t.code[pk::sorted_place(code, i)] = i;
  for (int i = 0; i < 15; i++) t.value[i] = pk::threshold_between(code[t.code[i]], code[t.code[i + 1]]);
  return t;
}

static inline int nearest(const Thresholds& t, float v) {
  if (v != v) return t.code[16];
  int rank = 0;
  for (int i = 0; i < 15; i++) rank += v > t.value[i];
  return t.code[rank];
}

template <typename T>
static void quantize_block(const T* w, int64_t count, const Thresholds& t, float inverse, uint8_t* packed) {
  alignas(64) float index[VW];
  int64_t i = 0;
  for (; i + VW <= count; i += VW) {
    vf v = loadx(w + i) * set1(inverse);
    vi rank = vi{};
    for (int j = 0; j < 15; j++) rank -= (v > set1(t.value[j]));  // a true lane is -1
    rank += (v != v) * -16;                                       // no threshold lies below a NaN: 0 + 16
    store(index, (vf)rank);
    const int32_t* ranks = (const int32_t*)index;
    for (int l = 0; l < VW; l += 2)
      packed[(i + l) >> 1] = pk::pack_codes(t.code[ranks[l]], t.code[ranks[l + 1]]);
  }
  for (; i < count; i += 2) {
    int first = nearest(t, to_float(w[i]) * inverse),
        second = nearest(t, i + 1 < count ? to_float(w[i + 1]) * inverse : 0.0f);
    packed[i >> 1] = pk::pack_codes(first, second);
  }
}

template <typename T>
static void quantize_as(const T* w, int64_t numel, int32_t blocksize, const float* code, uint8_t* packed,
                        float* absmax, int threads) {
  const Thresholds thresholds = make_thresholds(code);
  const int64_t blocks = (numel + blocksize - 1) / blocksize;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < blocks; b++) {
    int64_t start = b * blocksize, count = numel - start < blocksize ? numel - start : blocksize;
    absmax[b] = block_absmax(w + start, count);
    quantize_block(w + start, count, thresholds, pk::inverse_of(absmax[b]), packed + (start >> 1));
  }
}

static void quantize(const pk::Quantize& a, int threads) {
  by_dtype(a.dtype, [&](auto value) {
    quantize_as((const decltype(value)*)a.w, a.numel, a.blocksize, a.code, a.packed, a.absmax, threads);
  });
}

static void quantize_absmax(const pk::QuantizeAbsmax& a, int threads) {
  float thresholds[pk::ABSMAX_CODES];  // 255 of them
  for (int i = 0; i < 255; i++) thresholds[i] = pk::threshold_between(a.code[i], a.code[i + 1]);
  const int64_t blocks = (a.count + a.blocksize - 1) / a.blocksize;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < blocks; b++) {
    int64_t start = b * a.blocksize, stop = start + a.blocksize < a.count ? start + a.blocksize : a.count;
    a.nested[b] = block_absmax(a.absmax + start, stop - start);
    const float inverse = pk::inverse_of(a.nested[b]);
    for (int64_t i = start; i < stop; i++) a.out[i] = (uint8_t)pk::rank_of(thresholds, a.absmax[i] * inverse);
  }
}

}  // namespace PK_NS

#else  // the C function, compiled once, in dispatch.cpp
#include "entry.h"

extern "C" {

int pk_quantize_4bit_cpu(const void* w, int dtype, int64_t numel, int32_t blocksize, const float* code,
                         uint8_t* packed, float* absmax, int threads) {
  if (int bad = check_quantize(w, dtype, numel, blocksize, code, packed, absmax)) return bad;
  current->quantize({w, dtype, numel, blocksize, code, packed, absmax}, threads_or_default(threads));
  return PK_OK;
}

int pk_quantize_absmax_cpu(const float* absmax, int64_t count, int32_t blocksize, const float* code,
                           uint8_t* out, float* nested, int threads) {
  if (int bad = check_quantize_absmax(absmax, count, blocksize, code, out, nested)) return bad;
  current->quantize_absmax({absmax, count, blocksize, code, out, nested}, threads_or_default(threads));
  return PK_OK;
}

}  // extern "C"
#endif
