// Weight formats (ir/quant.py): how BLOCK stored inputs of one output row become two vectors.
//
// A format whose values sit in alternating halves of a word (bf16) or byte (int4) yields the even inputs
// first and then the odd ones; its activations are packed in the same order, so nothing is shuffled while
// weights stream.  Every dot product therefore runs in the "stream order" of its format.
#pragma once
#include "simd.h"

namespace mill {

constexpr int BLOCK = 2 * LANES;

// One matrix [n, k] in its parts; `scale` is null for fp32 and bf16.
struct Weight {
  const void *q, *scale;
  int n, k;
};

// One output row.
struct WeightRow {
  const uint8_t *q;
  const void *scale;
};

struct Fp32 : Weight {
  static constexpr bool INTERLEAVED = false, ROW_SCALE = false;
  static constexpr size_t bytes(int inputs) { return (size_t)inputs * 4; }
  TM_INLINE WeightRow row(int i) const { return {(const uint8_t *)q + i * bytes(k), nullptr}; }
  static TM_INLINE const void *scale_at(const WeightRow &, int) { return nullptr; }
  static TM_INLINE void decode(const WeightRow &r, int block, vf &a, vf &b) {
    const float *p = (const float *)r.q + (size_t)block * BLOCK;
    a = load(p);
    b = load(p + LANES);
  }
  Fp32 expert(int e) const { return {{(const uint8_t *)q + e * (n * bytes(k)), nullptr, n, k}}; }
};

struct Bf16 : Weight {
  static constexpr bool INTERLEAVED = true, ROW_SCALE = false;
  static constexpr size_t bytes(int inputs) { return (size_t)inputs * 2; }
  TM_INLINE WeightRow row(int i) const { return {(const uint8_t *)q + i * bytes(k), nullptr}; }
  static TM_INLINE const void *scale_at(const WeightRow &, int) { return nullptr; }
  static TM_INLINE void decode(const WeightRow &r, int block, vf &a, vf &b) {
    const vi pairs = *(const vi_at *)(r.q + bytes(block * BLOCK));
    a = (vf)(pairs << 16);
    b = (vf)(pairs & (int32_t)0xffff0000);
  }
  Bf16 expert(int e) const { return {{(const uint8_t *)q + e * (n * bytes(k)), nullptr, n, k}}; }
};

typedef int8_t lane_bytes __attribute__((vector_size(LANES)));
typedef uint8_t lane_ubytes __attribute__((vector_size(LANES)));
typedef int8_t lane_bytes_at __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint8_t lane_ubytes_at __attribute__((vector_size(LANES), aligned(1), may_alias));

// LANES bytes, sign- or zero-extended to 32 bits
TM_INLINE vi extend(const int8_t *p) {
#if defined(__AVX512F__) && TM_VECTOR_BYTES == 64
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__) && TM_VECTOR_BYTES == 32
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
  return __builtin_convertvector(*(const lane_bytes_at *)p, vi);
#endif
}
TM_INLINE vi extend(const uint8_t *p) {
#if defined(__AVX512F__) && TM_VECTOR_BYTES == 64
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__) && TM_VECTOR_BYTES == 32
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
  return __builtin_convertvector(*(const lane_ubytes_at *)p, vi);
#endif
}

// The scale [n] multiplies the finished dot product.
struct Int8 : Weight {
  static constexpr bool INTERLEAVED = false, ROW_SCALE = true;
  static constexpr size_t bytes(int inputs) { return (size_t)inputs; }
  TM_INLINE WeightRow row(int i) const { return {(const uint8_t *)q + i * bytes(k), nullptr}; }
  static TM_INLINE const void *scale_at(const WeightRow &, int) { return nullptr; }
  static TM_INLINE void decode(const WeightRow &r, int block, vf &a, vf &b) {
    const int8_t *p = (const int8_t *)r.q + (size_t)block * BLOCK;
    a = to_float(extend(p));
    b = to_float(extend(p + LANES));
  }
  Int8 expert(int e) const {
    return {{(const uint8_t *)q + e * (n * bytes(k)), (const float *)scale + (size_t)e * n, n, k}};
  }
};

// LANES e4m3 values as floats (finite ones: a weight never holds the NaN codes 7f, ff).
TM_INLINE vf decode_e4m3(const uint8_t *p) {
#if defined(__AVX512F__) && TM_VECTOR_BYTES == 64
  // As fp16: sign, then the exponent and fraction one place lower, which is off by 2^8.
  const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)), 7);
  return (vf)_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16((short)0xbf80))) * 256.0f;
#elif defined(__AVX2__) && TM_VECTOR_BYTES == 32
  const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)p)), 7);
  return (vf)_mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16((short)0xbf80))) * 256.0f;
#else
  // As fp32: the same, off by 2^120.
  const vi u = extend(p);
  return (vf)(((u & 0x7f) << 20) | ((u & 0x80) << 24)) * 0x1p120f;
#endif
}

// One fp32 scale per 128 x 128 block.
struct Fp8 : Weight {
  static constexpr bool INTERLEAVED = false, ROW_SCALE = false;
  static constexpr size_t bytes(int inputs) { return (size_t)inputs; }
  TM_INLINE WeightRow row(int i) const {
    const size_t scales = (size_t)(i / 128) * ceil_div(k, 128);
    return {(const uint8_t *)q + i * bytes(k), (const float *)scale + scales};
  }
  static TM_INLINE const void *scale_at(const WeightRow &r, int block) {
    return (const float *)r.scale + block * BLOCK / 128;
  }
  static TM_INLINE void decode(const WeightRow &r, int block, vf &a, vf &b) {
    const float s = *(const float *)scale_at(r, block);
    const uint8_t *p = r.q + (size_t)block * BLOCK;
    a = decode_e4m3(p) * s;
    b = decode_e4m3(p + LANES) * s;
  }
  Fp8 expert(int e) const {
    const size_t scales = (size_t)ceil_div(n, 128) * ceil_div(k, 128);
    return {{(const uint8_t *)q + e * (n * bytes(k)), (const float *)scale + e * scales, n, k}};
  }
};

// value = (nibble - 8) * scale, one bf16 scale per GROUP inputs; every product is exact in fp32.
template <int GROUP>
struct Int4 : Weight {
  static constexpr bool INTERLEAVED = true, ROW_SCALE = false;
  static constexpr size_t bytes(int inputs) { return (size_t)(inputs + 1) / 2; }
  TM_INLINE WeightRow row(int i) const {
    return {(const uint8_t *)q + i * bytes(k), (const uint16_t *)scale + (size_t)i * ceil_div(k, GROUP)};
  }
  static TM_INLINE const void *scale_at(const WeightRow &r, int block) {
    return (const uint16_t *)r.scale + block * BLOCK / GROUP;
  }
  static TM_INLINE void decode(const WeightRow &r, int block, vf &a, vf &b) {
    const float s = from_bf16(*(const uint16_t *)scale_at(r, block));
    const vi pairs = extend(r.q + bytes(block * BLOCK));
#if defined(__AVX512F__) && TM_VECTOR_BYTES == 64
    // vpermps looks up 16 floats by the low four bits of each lane.
    const __m512 table = (__m512)((iota() - 8.0f) * s);
    a = (vf)_mm512_permutexvar_ps((__m512i)pairs, table);
    b = (vf)_mm512_permutexvar_ps((__m512i)(pairs >> 4), table);
#else
    a = to_float((pairs & 15) - 8) * s;
    b = to_float((pairs >> 4) - 8) * s;
#endif
  }
  Int4 expert(int e) const {
    const size_t scales = (size_t)n * ceil_div(k, GROUP);
    return {{(const uint8_t *)q + e * (n * bytes(k)), (const uint16_t *)scale + e * scales, n, k}};
  }
};

// The last, partial block of a row: its bytes are copied so that nothing past the row is read.
template <class W>
TM_INLINE void decode_tail(const WeightRow &r, int block, int inputs, vf &a, vf &b) {
  alignas(64) uint8_t bytes[BLOCK * 4] = {};
  memcpy(bytes, r.q + W::bytes(block * BLOCK), W::bytes(inputs));
  W::decode(WeightRow{bytes, W::scale_at(r, block)}, 0, a, b);
}

}  // namespace mill
