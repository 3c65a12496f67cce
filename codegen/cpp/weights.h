// Weight formats as panels (ir/packing.py), the activations that they are multiplied with, and the
// arithmetic of each: 16 rows stand side by side in the lanes, and every lane sums one output.
#pragma once
#include "simd.h"

namespace mill {

constexpr int PANEL = 16;             // rows of a panel
constexpr int STEP = 32;              // inputs are padded to whole steps; a step of INT8 inputs has one scale
constexpr int VECS = PANEL / LANES;   // vectors that hold one value per row

constexpr int panels(int rows) { return ceil_div(rows, PANEL); }
constexpr int steps(int k) { return ceil_div(k, STEP); }

// A matrix [n, k]: `q` its panels, `scale` [panels, columns of scales, 16].
struct Weight {
  const void *q, *scale;
  int n, k;
};

// --- activations ------------------------------------------------------------------------------------
// A packed row starts at a multiple of 64 bytes and is padded with zeros to whole steps; pack_step makes
// one step of it from the first n values at x.

struct FloatInputs {
  static constexpr size_t bytes(int k) { return (size_t)steps(k) * STEP * 4; }
  static TM_INLINE void pack(uint8_t *to, const float *x, int k) {
    for (int i = 0; i < steps(k); i++) pack_step(to, k, i, x + i * STEP, k - i * STEP);
  }
  static TM_INLINE void pack_step(uint8_t *to, int, int step, const float *x, int n) {
    const int at = step * STEP;
    for (int i = 0; i < STEP; i += LANES)
      store((float *)to + at + i, i < n ? load_n(x + i, n - i) : vf{});
  }
};

struct Bf16Inputs {
  static constexpr size_t bytes(int k) { return (size_t)steps(k) * STEP * 2; }
  static TM_INLINE void pack(uint8_t *to, const float *x, int k) {
    for (int i = 0; i < steps(k); i++) pack_step(to, k, i, x + i * STEP, k - i * STEP);
  }
  static TM_INLINE void pack_step(uint8_t *to, int, int step, const float *x, int n) {
    const int at = step * STEP;
    for (int i = 0; i < STEP; i += LANES)
      store_bf16((uint16_t *)to + at + i, i < n ? load_n(x + i, n - i) : vf{});
  }
};

// Values, then a scale per step, then per step -ZERO times the sum of its values: weights are stored with
// ZERO added, and start from there.  scale = max |x| / 127, values round to nearest even.
template <int ZERO>
struct Int8Inputs {
  static constexpr size_t bytes(int k) { return round_up(steps(k) * (STEP + 8), 64); }
  static TM_INLINE const float *scales(const uint8_t *row, int k) {
    return (const float *)(row + steps(k) * STEP);
  }
  static TM_INLINE const int32_t *starts(const uint8_t *row, int k) {
    return (const int32_t *)(row + steps(k) * (STEP + 4));
  }
  static TM_INLINE void pack(uint8_t *to, const float *x, int k) {
    for (int i = 0; i < steps(k); i++) pack_step(to, k, i, x + i * STEP, k - i * STEP);
  }
  static TM_INLINE void pack_step(uint8_t *to, int k, int i, const float *x, int n) {
    constexpr int PARTS = STEP / LANES;
    vf part[PARTS], peak = {};
    for (int j = 0; j < PARTS; j++) {
      part[j] = j * LANES < n ? load_n(x + j * LANES, n - j * LANES) : vf{};
      const vf size = abs(part[j]);
      peak = select((size > peak) | (size != size), size, peak);
    }
    // What is not finite makes NaN of all that it is summed with.
    float scale = highest(peak) / 127.0f + ::mill::sum(peak - peak);
    scale = scale < 1.17549435e-38f ? 0.0f : scale;
    const float inverse = scale == 0.0f ? 1.0f : 1.0f / scale;
    vi sum = {};
    for (int j = 0; j < PARTS; j++) {
      const vi q = to_int(round(part[j] * inverse));
      store_bytes((int8_t *)to + i * STEP + j * LANES, q);
      sum += q;
    }
    ((float *)(to + steps(k) * STEP))[i] = scale;
    ((int32_t *)(to + steps(k) * (STEP + 4)))[i] = -ZERO * (int32_t)::mill::sum(to_float(sum));
  }
};

// --- arithmetic -------------------------------------------------------------------------------------

// acc + the products of four unsigned bytes of w with four signed ones of x, per lane.  SMALL: w < 64.
template <bool SMALL>
TM_INLINE vi dot4(vi acc, vi w, int32_t x) {
#if defined(__AVX512VNNI__) && TM_VECTOR_BYTES == 64
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVXVNNI__) && TM_VECTOR_BYTES == 32
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, _mm256_set1_epi32(x));
#elif defined(__AVX512BW__) && TM_VECTOR_BYTES == 64
  if (SMALL) {
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)w, _mm512_set1_epi32(x));
    return acc + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
  }
  const __m512i even = _mm512_set1_epi32((int32_t)(((uint32_t)(int16_t)(int8_t)(x >> 16) << 16) | (uint16_t)(int8_t)x));
  const __m512i odd = _mm512_set1_epi32((int32_t)(((uint32_t)(int16_t)(int8_t)(x >> 24) << 16) | (uint16_t)(int8_t)(x >> 8)));
  const __m512i low = _mm512_set1_epi16(255);
  return acc + (vi)_mm512_madd_epi16(_mm512_and_si512((__m512i)w, low), even) +
         (vi)_mm512_madd_epi16(_mm512_srli_epi16((__m512i)w, 8), odd);
#elif defined(__AVX2__) && TM_VECTOR_BYTES == 32
  if (SMALL) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(x));
    return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  const __m256i xs = _mm256_set1_epi32(x);
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(xs, 8), 8), odd = _mm256_srai_epi16(xs, 8);
  return acc + (vi)_mm256_madd_epi16(_mm256_and_si256((__m256i)w, _mm256_set1_epi16(255)), even) +
         (vi)_mm256_madd_epi16(_mm256_srli_epi16((__m256i)w, 8), odd);
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  return (vi)vusdotq_s32((int32x4_t)acc, (uint8x16_t)w, (int8x16_t)splat(x));
#elif defined(__ARM_FEATURE_DOTPROD)
  const int8x16_t xs = (int8x16_t)splat(x);
  if (SMALL) return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)w, xs);
  // Both are signed here: w - 128, and twice 64 times the sum of x, which is the same for all w.
  const int8x16_t half = vdupq_n_s8(64);
  const int32x4_t sum = vdotq_s32(vdotq_s32(vdupq_n_s32(0), half, xs), half, xs);
  return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)(w ^ (int32_t)0x80808080), xs) + (vi)sum;
#else
  for (int i = 0; i < 32; i += 8) acc += ((w >> i) & 255) * (int32_t)(int8_t)(x >> i);
  return acc;
#endif
}

// acc + the products of two bf16 of w with two of x, per lane.
TM_INLINE vf dot2(vf acc, vi w, int32_t x) {
#if defined(__AVX512BF16__) && TM_VECTOR_BYTES == 64
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
#elif defined(TM_BF16_DOT)
  return (vf)vbfdotq_f32((float32x4_t)acc, (bfloat16x8_t)w, (bfloat16x8_t)splat(x));
#else
  const vi xs = splat(x), high = splat((int32_t)0xffff0000);
  acc += (vf)(w << 16) * (vf)(xs << 16);
  return acc + (vf)(w & high) * (vf)(xs & high);
#endif
}

// --- formats ----------------------------------------------------------------------------------------
// Formats with fp32 sums (INTEGER false) say in `multiply` how to add one step of a panel to T tokens'
// sums, two per output so that additions need not wait for each other.  Those with integer sums yield
// in `load` the four-byte words of inputs [8 j, 8 j + 8) of a step, and a scale per row.

template <int T>
using Sums = vf[2][T][VECS];

struct Fp32 : Weight {
  using Inputs = FloatInputs;
  static constexpr bool INTEGER = false;
  static constexpr size_t STEP_BYTES = STEP * PANEL * 4;
  static constexpr int SCALE_BYTES = 0;
  static constexpr int scales(int) { return 0; }
  template <int T>
  static TM_INLINE void multiply(Sums<T> &sums, const uint8_t *q, const void *, int step,
                                 const uint8_t *const *x) {
    for (int i = 0; i < STEP; i += 2)
      TM_UNROLL for (int half = 0; half < 2; half++) {
        vf w[VECS];
        for (int v = 0; v < VECS; v++) w[v] = load((const float *)q + (i + half) * PANEL + v * LANES);
        TM_UNROLL for (int t = 0; t < T; t++) {
          const float a = ((const float *)x[t])[step * STEP + i + half];
          for (int v = 0; v < VECS; v++) sums[half][t][v] += w[v] * a;
        }
      }
  }
};

struct Bf16 : Weight {
  using Inputs = Bf16Inputs;
  static constexpr bool INTEGER = false;
  static constexpr size_t STEP_BYTES = STEP * PANEL * 2;
  static constexpr int SCALE_BYTES = 0;
  static constexpr int scales(int) { return 0; }
  template <int T>
  static TM_INLINE void multiply(Sums<T> &sums, const uint8_t *q, const void *, int step,
                                 const uint8_t *const *x) {
    for (int i = 0; i < STEP / 2; i += 2)
      TM_UNROLL for (int half = 0; half < 2; half++) {
        vi w[VECS];
        for (int v = 0; v < VECS; v++) w[v] = words(q + (i + half) * PANEL * 4 + v * TM_VECTOR_BYTES);
        TM_UNROLL for (int t = 0; t < T; t++) {
          const int32_t a = ((const int32_t *)x[t])[step * (STEP / 2) + i + half];
          for (int v = 0; v < VECS; v++) sums[half][t][v] = dot2(sums[half][t][v], w[v], a);
        }
      }
  }
};

// One fp32 scale per row and 128 inputs.
struct Fp8 : Weight {
  using Inputs = FloatInputs;
  static constexpr bool INTEGER = false;
  static constexpr size_t STEP_BYTES = STEP * PANEL;
  static constexpr int SCALE_BYTES = 4;
  static constexpr int scales(int k) { return ceil_div(k, 128); }
  template <int T>
  static TM_INLINE void multiply(Sums<T> &sums, const uint8_t *q, const void *scale, int step,
                                 const uint8_t *const *x) {
    const float *s = (const float *)scale + step * STEP / 128 * PANEL;
    for (int i = 0; i < STEP; i += 2)
      TM_UNROLL for (int half = 0; half < 2; half++) {
        vf w[VECS];
        for (int v = 0; v < VECS; v++)
          w[v] = load_e4m3(q + (i + half) * PANEL + v * LANES) * load(s + v * LANES);
        TM_UNROLL for (int t = 0; t < T; t++) {
          const float a = ((const float *)x[t])[step * STEP + i + half];
          for (int v = 0; v < VECS; v++) sums[half][t][v] += w[v] * a;
        }
      }
  }
};

// One fp32 scale per row, applied to the finished sum.
struct Int8 : Weight {
  using Inputs = Int8Inputs<128>;
  static constexpr bool INTEGER = true, SMALL = false, STEP_SCALES = false;
  static constexpr size_t STEP_BYTES = STEP * PANEL;
  static constexpr int SCALE_BYTES = 4;
  static constexpr int scales(int) { return 1; }
  static TM_INLINE void load(const uint8_t *q, int j, vi (&low)[VECS], vi (&high)[VECS]) {
    for (int v = 0; v < VECS; v++) {
      low[v] = words(q + (2 * j) * PANEL * 4 + v * TM_VECTOR_BYTES);
      high[v] = words(q + (2 * j + 1) * PANEL * 4 + v * TM_VECTOR_BYTES);
    }
  }
  static TM_INLINE vf scale_at(const void *scale, int, int v) {
    return ::mill::load((const float *)scale + v * LANES);
  }
};

// value = (nibble - 8) * scale, one bf16 scale per row and GROUP inputs.
template <int GROUP>
struct Int4 : Weight {
  using Inputs = Int8Inputs<8>;
  static constexpr bool INTEGER = true, SMALL = true, STEP_SCALES = true;
  static constexpr size_t STEP_BYTES = STEP * PANEL / 2;
  static constexpr int SCALE_BYTES = 2;
  static constexpr int scales(int k) { return ceil_div(k, GROUP); }
  static TM_INLINE void load(const uint8_t *q, int j, vi (&low)[VECS], vi (&high)[VECS]) {
    for (int v = 0; v < VECS; v++) {
      const vi both = words(q + j * PANEL * 4 + v * TM_VECTOR_BYTES);
      low[v] = both & 0x0f0f0f0f;
      high[v] = (both >> 4) & 0x0f0f0f0f;
    }
  }
  static TM_INLINE vf scale_at(const void *scale, int step, int v) {
    return load_bf16((const uint16_t *)scale + step * STEP / GROUP * PANEL + v * LANES);
  }
};

// Matrix e of several, each of `count` panels.
template <class W>
TM_INLINE Weight expert_weight(const void *q, const void *scale, int count, int n, int k, int e) {
  const size_t first = (size_t)e * count;
  return {(const uint8_t *)q + first * steps(k) * W::STEP_BYTES,
          (const uint8_t *)scale + first * W::scales(k) * PANEL * W::SCALE_BYTES, n, k};
}

}  // namespace mill
