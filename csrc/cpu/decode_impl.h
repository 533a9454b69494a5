// Decoding a 4-bit (or dense) weight: any run of elements, to fp32 for the kernels or to any dtype for the
// dequantization.
#pragma once
#include "../formats.h"
#include "linear.h"
#include "simd.h"

namespace PK_NS {

// `count` codes from element `start` on, all of one block, times `scale` -> out.
template <typename T>
static void decode_run(const uint8_t* packed, const float* code, const Table& table, int64_t start,
                       int64_t count, float scale, T* out) {
  int64_t i = 0;
  if ((start & 1) && count) from_float(code[pk::nibble(packed, start)] * scale, &out[i++]);
  const vf s = set1(scale);
  for (; i + GROUP <= count; i += GROUP) {
    vf values[GROUP / VW];
    lookup_group_natural(table, packed + ((start + i) >> 1), values);
    for (int j = 0; j < GROUP / VW; j++) storex(out + i + j * VW, values[j] * s);
  }
  for (; i + VW <= count; i += VW) storex(out + i, lookup(table, packed + ((start + i) >> 1)) * s);
  for (; i < count; i++) from_float(code[pk::nibble(packed, start + i)] * scale, &out[i]);
}

#if defined(PK_AVX2) || defined(PK_AVX512)
// A block's 16 values, rounded to T, in one register: through memory the load would wait for the stores.
#if defined(PK_AVX512)
static inline __m256i rounded_codes(vf v, bf16*) { return bits_of_bf16(v); }
static inline __m256i rounded_codes(vf v, f16*) {
  return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
static inline __m256i rounded_codes(vf a, vf b, bf16*) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)round_bf16(a), (__m256i)round_bf16(b)), 0xd8);
}
static inline __m256i rounded_codes(vf a, vf b, f16*) {
  return _mm256_setr_m128i(_mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT),
                           _mm256_cvtps_ph((__m256)b, _MM_FROUND_TO_NEAREST_INT));
}
#endif

#if defined(PK_AVX512BF16)
// Byte i of 16 twice, in the low bytes of two 16-bit lanes; their high bytes are never looked at.
static inline __m512i byte_pairs() {
  alignas(64) static constexpr uint16_t INDEX[32] = {0,  0,  1,  1,  2,  2,  3,  3,  4,  4,  5,
                                                     5,  6,  6,  7,  7,  8,  8,  9,  9,  10, 10,
                                                     11, 11, 12, 12, 13, 13, 14, 14, 15, 15};
  return _mm512_load_si512(INDEX);
}
#endif
#if defined(PK_AVX512)
// 32 codes from 16 bytes, one a 16-bit lane, in its low four bits.
static inline __m512i word_codes(const uint8_t* packed) {
#if defined(PK_AVX512BF16)
  // The first of two codes is the high nibble.
  const __m512i twice = byte_pairs(), high = _mm512_set1_epi32(4);
  const __m512i bytes = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)packed));
  return _mm512_srlv_epi16(_mm512_permutexvar_epi8(twice, bytes), high);
#else
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)packed));
  return _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
#endif
}
#endif

// 16-bit outputs: the block's 16 values are rounded once and looked up by their bits, which is the same value
// for less work.
template <typename T>
static void decode_run_16bit(const uint8_t* packed, const float* code, const Table& table, int64_t start,
                             int64_t count, float scale, T* out) {
  constexpr int STEP = 64 / (VW == 16 ? 2 : 1);  // codes a round
  if ((start & 1) || count < STEP) return decode_run(packed, code, table, start, count, scale, out);
  const uint8_t* p = packed + (start >> 1);
  int64_t i = 0;
#if defined(PK_AVX512)
  const __m256i once = rounded_codes(load(code) * set1(scale), (T*)nullptr);
  // Vpermw reads five bits: twice the table makes the fifth irrelevant.
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(once), once, 1);
  for (; i + STEP <= count; i += STEP) {
    _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(word_codes(p + (i >> 1)), both));
  }
#else
  const __m256i pair = rounded_codes(load(code) * set1(scale), load(code + 8) * set1(scale), (T*)nullptr);
  const __m256i byte = _mm256_set1_epi16(0xff), four = _mm256_set1_epi8(15);
  const __m256i low = _mm256_permute4x64_epi64(
      _mm256_packus_epi16(_mm256_and_si256(pair, byte), _mm256_and_si256(pair, byte)), 0x88);
  const __m256i high = _mm256_permute4x64_epi64(
      _mm256_packus_epi16(_mm256_srli_epi16(pair, 8), _mm256_srli_epi16(pair, 8)), 0x88);
  for (; i + STEP <= count; i += STEP) {
    __m256i bytes = _mm256_loadu_si256((const __m256i*)(p + (i >> 1)));
    __m256i first = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), four),
            second = _mm256_and_si256(bytes, four);
    // bytes 0-7|16-23, 8-15|24-31.
    __m256i a = _mm256_unpacklo_epi8(first, second), b = _mm256_unpackhi_epi8(first, second);
    __m256i al = _mm256_shuffle_epi8(low, a), ah = _mm256_shuffle_epi8(high, a);
    __m256i bl = _mm256_shuffle_epi8(low, b), bh = _mm256_shuffle_epi8(high, b);
    __m256i a0 = _mm256_unpacklo_epi8(al, ah), a1 = _mm256_unpackhi_epi8(al, ah);
    __m256i b0 = _mm256_unpacklo_epi8(bl, bh), b1 = _mm256_unpackhi_epi8(bl, bh);
    __m256i* o = (__m256i*)(out + i);
    _mm256_storeu_si256(o, _mm256_permute2x128_si256(a0, a1, 0x20));
    _mm256_storeu_si256(o + 1, _mm256_permute2x128_si256(b0, b1, 0x20));
    _mm256_storeu_si256(o + 2, _mm256_permute2x128_si256(a0, a1, 0x31));
    _mm256_storeu_si256(o + 3, _mm256_permute2x128_si256(b0, b1, 0x31));
  }
#endif
  decode_run(packed, code, table, start + i, count - i, scale, out + i);
}
static inline void decode_block(const uint8_t* p, const float* c, const Table& t, int64_t start,
                                int64_t count, float s, bf16* out) {
  decode_run_16bit(p, c, t, start, count, s, out);
}
static inline void decode_block(const uint8_t* p, const float* c, const Table& t, int64_t start,
                                int64_t count, float s, f16* out) {
  decode_run_16bit(p, c, t, start, count, s, out);
}
static inline void decode_block(const uint8_t* p, const float* c, const Table& t, int64_t start,
                                int64_t count, float s, float* out) {
  decode_run(p, c, t, start, count, s, out);
}
#else
template <typename T>
static inline void decode_block(const uint8_t* p, const float* c, const Table& t, int64_t start,
                                int64_t count, float s, T* out) {
  decode_run(p, c, t, start, count, s, out);
}
#endif

template <typename Src, typename T>
static void convert(const Src* in, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + VW <= count; i += VW) storex(out + i, loadx(in + i));
  for (; i < count; i++) from_float(to_float(in[i]), &out[i]);
}

#if defined(PK_AVX512)
// out [count] = the absmax of the blocks of elements start, start + stride, ... of a 4-bit weight.
static void block_scales(const pk_weight& w, int64_t start, int64_t stride, int64_t count, float* out) {
  const int shift = pk::log2_of(w.blocksize);
  if (const float* absmax = w.absmax) {
    for (int64_t i = 0; i < count; i++, start += stride) out[i] = absmax[start >> shift];
    return;
  }
  const uint8_t* bytes = w.absmax_8bit;
  const float *code = w.absmax_code, *nested = w.nested_absmax, offset = *w.absmax_offset;
  const int nested_shift = shift + pk::log2_of(w.nested_blocksize);
  for (int64_t i = 0; i < count; i++, start += stride)
    out[i] = pk::denested(code[bytes[start >> shift]], nested[start >> nested_shift], offset);
}

// `count` whole blocks of 32 codes or more from element `start` on -> 16-bit outputs.
template <typename T>
static void decode_blocks(const pk_weight& w, int64_t start, int64_t count, T* out) {
  constexpr int64_t MOST = 64;
  const int64_t size = w.blocksize;
  const uint8_t* packed = (const uint8_t*)w.data + (start >> 1);
  const vf codes = load(w.code);
  float scales[MOST];
  for (int64_t done = 0; done < count; done += MOST) {
    const int64_t here = count - done < MOST ? count - done : MOST;
    block_scales(w, start + done * size, size, here, scales);
    for (int64_t b = 0; b < here; b++) {
      const __m256i once = rounded_codes(codes * set1(scales[b]), (T*)nullptr);
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(once), once, 1);
      for (int64_t i = 0; i < size; i += 32, packed += 16, out += 32)
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(word_codes(packed), both));
    }
  }
}
static inline void decode_blocks(const pk_weight&, int64_t, int64_t, float*) {}
#endif

// Elements [start, start + count) of the flattened weight -> out.
template <typename T>
static void decode(const pk_weight& w, const Table& table, int64_t start, int64_t count, T* out) {
  if (!w.code) {
    if (w.dtype == PK_F32) return convert((const float*)w.data + start, count, out);
    if (w.dtype == PK_BF16) return convert((const bf16*)w.data + start, count, out);
    return convert((const f16*)w.data + start, count, out);
  }
  const int64_t size = w.blocksize;
  const int shift = __builtin_ctz((unsigned)w.blocksize);
  const int64_t end = start + count;
#if defined(PK_AVX512)
  if (sizeof(T) == 2 && size >= 32 && start % size == 0) {
    const int64_t whole = count >> shift;
    decode_blocks(w, start, whole, out);
    start += whole << shift, out += whole << shift;
  }
#endif
  while (start < end) {
    int64_t block = start >> shift, stop = (block + 1) * size, run = (stop < end ? stop : end) - start;
    decode_block((const uint8_t*)w.data, w.code, table, start, run, pk::absmax_of(w, block), out);
    start += run;
    out += run;
  }
}

// Pieces [col, col + cols) of `rows` rows from `row` on -> out [rows][ld]. The pieces lie k/2 bytes apart,
// too short for the hardware's streams.
static void decode_pieces(const pk_weight& w, const Table& table, int64_t row, int64_t rows, int64_t col,
                          int64_t cols, float* out, int64_t ld) {
  constexpr int64_t AHEAD = 4;
  for (int64_t i = 0; i < rows; i++) {
    if (w.code && i + AHEAD < rows) {
      const uint8_t* next = (const uint8_t*)w.data + (((row + i + AHEAD) * w.k + col) >> 1);
      for (int64_t byte = 0; byte < cols / 2; byte += 64) __builtin_prefetch(next + byte);
    }
    decode(w, table, (row + i) * w.k + col, cols, out + i * ld);
  }
}

// W[row .. row+rows)[col .. col+cols) -> out [rows, cols].
template <typename T>
static void dequantize_as(const pk_weight& w, int64_t row, int64_t rows, int64_t col, int64_t cols, T* out,
                          int threads) {
  const Table table = make_table(w.code);
  if (cols != w.k) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < rows; i++) decode(w, table, (row + i) * w.k + col, cols, out + i * cols);
    return;
  }
  // elements: 8 KB of codes a step, small enough to balance two threads, large enough to amortize.
  const int64_t chunk = 1 << 14;
  const int64_t start = row * w.k, count = rows * w.k, chunks = (count + chunk - 1) / chunk;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t c = 0; c < chunks; c++) {
    int64_t from = c * chunk, size = count - from < chunk ? count - from : chunk;
    decode(w, table, start + from, size, out + from);
  }
}

static void dequantize(const pk::Window& a, int threads) {
  by_dtype(a.dtype, [&](auto value) {
    dequantize_as(a.w, a.row, a.rows, a.col, a.cols, (decltype(value)*)a.out, threads);
  });
}

}  // namespace PK_NS
