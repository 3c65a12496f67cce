// Vectors of floats and the functions that expressions use, on compiler vector extensions.
//
// One width per target: TM_VECTOR_BYTES is 64 (x86-64-v4), 32 (x86-64-v3) or 16.  Intrinsics appear only
// where the extensions have no word for an instruction, each with a portable twin of the same bits.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif
#if defined(__AVX512BF16__) && TM_VECTOR_BYTES == 64 || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define TM_BF16_DOT  // pairs of bf16 are multiplied and summed in one instruction
#endif

#define TM_INLINE inline __attribute__((always_inline))
#define TM_NOINLINE __attribute__((noinline))
// Before a loop over registers: all of it, or its arrays live in memory.
#if defined(__clang__)
#define TM_UNROLL _Pragma("unroll")
#else
#define TM_UNROLL _Pragma("GCC unroll 16")
#endif

namespace mill {

typedef float vf __attribute__((vector_size(TM_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(TM_VECTOR_BYTES)));
typedef float vf_at __attribute__((vector_size(TM_VECTOR_BYTES), aligned(1), may_alias));
typedef int32_t vi_at __attribute__((vector_size(TM_VECTOR_BYTES), aligned(1), may_alias));
typedef float v4 __attribute__((vector_size(16)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v16 __attribute__((vector_size(64)));
typedef float v4_at __attribute__((vector_size(16), aligned(4), may_alias));

constexpr int LANES = TM_VECTOR_BYTES / 4;
typedef int8_t lane_bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint16_t lane_halves __attribute__((vector_size(2 * LANES), aligned(1), may_alias));

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }
constexpr int min(int a, int b) { return a < b ? a : b; }
constexpr int max(int a, int b) { return a > b ? a : b; }

// --- moving -----------------------------------------------------------------------------------------

TM_INLINE vf splat(float x) { return x - vf{}; }
TM_INLINE vi splat(int32_t x) { return x - vi{}; }
TM_INLINE vi words(const void *p) { return *(const vi_at *)p; }
TM_INLINE vf load(const float *p) { return *(const vf_at *)p; }
TM_INLINE void store(float *p, vf x) { *(vf_at *)p = x; }

// The first n floats, zeros behind; memory past them is not touched.
TM_INLINE vf load_n(const float *p, int n) {
  if (n >= LANES) return load(p);
  vf x = {};
  memcpy(&x, p, (size_t)n * sizeof(float));
  return x;
}
TM_INLINE void store_n(float *p, vf x, int n) {
  if (n >= LANES) return store(p, x);
  memcpy(p, &x, (size_t)n * sizeof(float));
}

// Start to bring these bytes into the nearest cache, or the one behind it.
template <int CACHE = 1>
TM_INLINE void prefetch(const void *p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const uint8_t *)p + i, 0, 4 - CACHE);
}

TM_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
TM_INLINE vi to_int(vf x) { return __builtin_convertvector(x, vi); }
TM_INLINE vi load_bytes(const int8_t *p) {
#if defined(__AVX512F__) && TM_VECTOR_BYTES == 64
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__) && TM_VECTOR_BYTES == 32
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
  return __builtin_convertvector(*(const lane_bytes *)p, vi);
#endif
}
// Lanes in [-128, 127] as bytes.
TM_INLINE void store_bytes(int8_t *p, vi x) {
#if defined(__AVX512F__) && TM_VECTOR_BYTES == 64
  _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)x));
#else
  *(lane_bytes *)p = __builtin_convertvector(x, lane_bytes);
#endif
}

// The lane numbers 0 .. LANES - 1 as a parameter pack (no header of the C++ library is used anywhere).
template <int... I>
struct Indices {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
  using type = Indices<I...>;
};
using Lanes = CountTo<LANES>::type;

template <int... I>
TM_INLINE vf evens(vf a, vf b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...);
}
template <int... I>
TM_INLINE vf odds(vf a, vf b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (2 * I + 1)...);
}
template <int Half, int... I>
TM_INLINE vf zip(vf a, vf b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (Half * LANES / 2 + I / 2 + I % 2 * LANES)...);
}
TM_INLINE vf evens(vf a, vf b) { return evens(a, b, Lanes{}); }
TM_INLINE vf odds(vf a, vf b) { return odds(a, b, Lanes{}); }
TM_INLINE vf zip_low(vf a, vf b) { return zip<0>(a, b, Lanes{}); }
TM_INLINE vf zip_high(vf a, vf b) { return zip<1>(a, b, Lanes{}); }

template <int... I>
TM_INLINE vf iota(Indices<I...>) {
  return vf{float(I)...};
}
TM_INLINE vf iota() { return iota(Lanes{}); }

// dst[c][r] = word c of the row at rows[r], for LANES x LANES: log2(LANES) perfect shuffles of the rows.
TM_INLINE void transpose(const uint8_t *const *rows, size_t from, float *dst, int dst_pitch) {
  vf a[LANES], b[LANES];
  for (int i = 0; i < LANES; i++) a[i] = load((const float *)(rows[i] + from));
  for (int step = 1; step < LANES; step *= 2) {
    for (int i = 0; i < LANES / 2; i++) {
      b[2 * i] = zip_low(a[i], a[i + LANES / 2]);
      b[2 * i + 1] = zip_high(a[i], a[i + LANES / 2]);
    }
    for (int i = 0; i < LANES; i++) a[i] = b[i];
  }
  for (int i = 0; i < LANES; i++) store(dst + (size_t)i * dst_pitch, a[i]);
}

// --- sums over lanes, in one fixed order ------------------------------------------------------------

TM_INLINE v4 fold(v4 a) { return a; }
TM_INLINE v4 fold(v8 a) {
  return __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
}
TM_INLINE v4 fold(v16 a) {
  return fold(__builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7) +
              __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15));
}
// {sum a, sum b, sum c, sum d}
TM_INLINE v4 sum4(vf a, vf b, vf c, vf d) {
  const v4 p = fold(a), q = fold(b), r = fold(c), s = fold(d);
  const v4 pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
  const v4 rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
  return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}
TM_INLINE float sum(vf a) {
  const v4 f = fold(a);
  return (f[0] + f[2]) + (f[1] + f[3]);
}
TM_INLINE v4 fold_max(v4 a) { return a; }
TM_INLINE v4 fold_max(v8 a) {
  const v4 low = __builtin_shufflevector(a, a, 0, 1, 2, 3), high = __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return low > high ? low : high;
}
TM_INLINE v4 fold_max(v16 a) {
  const v8 low = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7);
  const v8 high = __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
  return fold_max(low > high ? low : high);
}
TM_INLINE float highest(vf a) {
  const v4 f = fold_max(a);
  const float p = f[0] > f[1] ? f[0] : f[1], q = f[2] > f[3] ? f[2] : f[3];
  return p > q ? p : q;
}

// --- the functions of ir.expr -----------------------------------------------------------------------

TM_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
TM_INLINE vi select(vi mask, vi a, vi b) { return mask ? a : b; }
TM_INLINE vf abs(vf x) { return (vf)((vi)x & 0x7fffffff); }
TM_INLINE vf neg(vf x) { return -x; }
TM_INLINE vf square(vf x) { return x * x; }
// A NaN in either operand is the result, as in torch.
TM_INLINE vf min(vf a, vf b) { return select((a < b) | (a != a), a, b); }
TM_INLINE vf max(vf a, vf b) { return select((a > b) | (a != a), a, b); }
TM_INLINE vf relu(vf x) { return select(x < 0.0f, vf{}, x); }

TM_INLINE vf sqrt(vf x) {
#if defined(__AVX512F__) && TM_VECTOR_BYTES == 64
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__) && TM_VECTOR_BYTES == 32
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
TM_INLINE vf rsqrt(vf x) { return 1.0f / sqrt(x); }

// Round to nearest even, |x| < 2^22: the sum with 1.5 * 2^23 has no fraction bits left.
TM_INLINE vf round(vf x) { return (x + 12582912.0f) - 12582912.0f; }
// 2^n for whole n in [-126, 127]
TM_INLINE vf power_of_two(vi n) { return (vf)((n + 127) << 23); }

// Cephes expf: x = n ln 2 + r, |r| <= ln 2 / 2, polynomial in r; below 2 ulp.  exp(-inf) is exactly 0.
TM_INLINE vf exp(vf x) {
  x = select(x > 89.0f, splat(89.0f), x);
  x = select(x < -104.0f, splat(-104.0f), x);
  const vf n = round(x * 1.44269504088896341f);
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vi whole = to_int(n), half = whole >> 1;
  return p * power_of_two(half) * power_of_two(whole - half);
}

// 2^x, polynomial (Cephes exp2f): exactly 1 at 0, and 0 from -126 downwards.  x <= 127.
TM_INLINE vf exp2(vf x) {
  const vf from = select(x < -126.0f, splat(-126.0f), x);
  const vf shifted = from + 12582912.0f;  // the whole part, in the last bits of the fraction
  const vf r = from - (shifted - 12582912.0f);
  vf p = splat(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  return select(x <= -126.0f, vf{}, (vf)((vi)p + ((vi)shifted << 23)));
}

// Cephes logf: x = m 2^e with m in [sqrt(1/2), sqrt(2)), polynomial in m - 1.
TM_INLINE vf log(vf x) {
  const vi tiny = x < 1.17549435e-38f;
  const vf scaled = select(tiny, x * 33554432.0f, x);
  const vi bits = (vi)scaled;
  vf m = (vf)((bits & 0x007fffff) | 0x3f000000);  // [1/2, 1)
  vf e = to_float(((bits >> 23) & 0xff) - 126) - select(tiny, splat(25.0f), vf{});
  const vi low = m < 0.707106781186547524f;
  e = select(low, e - 1.0f, e);
  m = select(low, m + m, m) - 1.0f;
  vf p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const vf m2 = m * m;
  vf y = p * m * m2 - e * 2.12194440e-4f - 0.5f * m2;
  y = m + y + e * 0.693359375f;
  y = select(x == 0.0f, splat(-__builtin_inff()), y);
  y = select(x == __builtin_inff(), x, y);
  return select((x < 0.0f) | (x != x), splat(__builtin_nanf("")), y);
}

// Rational minimax of tanh (Eigen, generic_fast_tanh_float): within a few ulp.
TM_INLINE vf tanh(vf x) {
  x = select(x > 7.90531110763549805f, splat(7.90531110763549805f), x);
  x = select(x < -7.90531110763549805f, splat(-7.90531110763549805f), x);
  const vf s = x * x;
  vf p = splat(-2.76076847742355e-16f);
  p = p * s + 2.00018790482477e-13f;
  p = p * s - 8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = p * s + 4.89352455891786e-03f;
  vf q = splat(1.19825839466702e-06f);
  q = q * s + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  return x * p / q;
}

// Rational minimax of erf on [-4, 4] (Eigen, erf for float): within a few ulp.
TM_INLINE vf erf(vf x) {
  x = select(x > 4.0f, splat(4.0f), x);
  x = select(x < -4.0f, splat(-4.0f), x);
  const vf s = x * x;
  vf p = splat(-2.72614225801306e-10f);
  p = p * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  vf q = splat(-1.45660718464996e-05f);
  q = q * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return x * p / q;
}

// log(1 + x) for x >= 0, exact where 1 + x rounds (Kahan).
TM_INLINE vf log1p(vf x) {
  const vf u = x + 1.0f;
  return select(u == 1.0f, x, log(u) * x / (u - 1.0f));
}

TM_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }
TM_INLINE vf silu(vf x) { return x / (1.0f + exp(-x)); }
TM_INLINE vf gelu(vf x) { return 0.5f * x * (1.0f + erf(x * 0.707106781186547524f)); }
// (1 + tanh u) / 2 = sigmoid(2 u), which keeps the digits that 1 + tanh loses for negative x.
TM_INLINE vf gelu_tanh(vf x) { return x * sigmoid(1.59576912160573071f * (x + 0.044715f * x * x * x)); }
TM_INLINE vf softplus(vf x) { return max(x, vf{}) + log1p(exp(-abs(x))); }

// --- bfloat16 ---------------------------------------------------------------------------------------

TM_INLINE float from_bf16(uint16_t h) {
  const uint32_t bits = (uint32_t)h << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
// Round to nearest even; a NaN stays one.
TM_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

TM_INLINE vf load_bf16(const uint16_t *p) {
#if defined(__AVX512F__) && TM_VECTOR_BYTES == 64
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
  return (vf)(__builtin_convertvector(*(const lane_halves *)p, vi) << 16);
#endif
}
TM_INLINE void store_bf16(uint16_t *p, vf x) {
#if defined(__AVX512BF16__) && TM_VECTOR_BYTES == 64
  *(lane_halves *)p = (lane_halves)_mm512_cvtneps_pbh((__m512)x);
#elif defined(TM_BF16_DOT)
  *(lane_halves *)p = (lane_halves)vcvt_bf16_f32((float32x4_t)x);
#else
  const vi bits = (vi)x, odd = (bits >> 16) & 1;
  const vi rounded = ((bits + 0x7fff + odd) >> 16) & 0xffff;
  *(lane_halves *)p = __builtin_convertvector(select(x == x, rounded, splat(0x7fc0)), lane_halves);
#endif
}

TM_INLINE void store_bf16_n(uint16_t *p, vf x, int n) {
  if (n >= LANES) return store_bf16(p, x);
  uint16_t all[LANES];
  store_bf16(all, x);
  memcpy(p, all, (size_t)n * sizeof(uint16_t));
}

// The halves of words of two vectors one by one: {a0, b0}, {a1, b1}, ... of their first or second half.
typedef int16_t vh __attribute__((vector_size(TM_VECTOR_BYTES)));
template <int Half, int... I>
TM_INLINE vi zip_halves(vi a, vi b, Indices<I...>) {
  return (vi)__builtin_shufflevector((vh)a, (vh)b, (Half * LANES + I / 2 + I % 2 * 2 * LANES)...);
}
template <int Half>
TM_INLINE vi zip_halves(vi a, vi b) {
  return zip_halves<Half>(a, b, CountTo<2 * LANES>::type{});
}

// Per lane the word {a, b} of two bf16, the first in the low half.
TM_INLINE vi pair_bf16(vf a, vf b) {
#if defined(__AVX512BF16__) && TM_VECTOR_BYTES == 64
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  return zip_halves<0>((vi)both, (vi)_mm512_shuffle_i64x2(both, both, 0xee));
#elif defined(TM_BF16_DOT)
  const int16x4_t low = vreinterpret_s16_bf16(vcvt_bf16_f32((float32x4_t)a));
  const int16x4_t high = vreinterpret_s16_bf16(vcvt_bf16_f32((float32x4_t)b));
  return (vi)__builtin_shufflevector(low, high, 0, 4, 1, 5, 2, 6, 3, 7);
#else
  uint16_t low[LANES], high[LANES];
  store_bf16(low, a);
  store_bf16(high, b);
  return __builtin_convertvector(*(const lane_halves *)low, vi) |
         __builtin_convertvector(*(const lane_halves *)high, vi) << 16;
#endif
}

// dst[i] = src[i] for n floats stored as fp32 or bf16, or as INT8 with a scale
TM_INLINE void widen(float *dst, const float *src, int n) { memcpy(dst, src, (size_t)n * 4); }
TM_INLINE void widen(float *dst, const uint16_t *src, int n) {
  for (int i = 0; i < n; i++) dst[i] = from_bf16(src[i]);
}
TM_INLINE void widen(float *dst, const int8_t *src, int n, float scale) {
  for (int i = 0; i < n; i++) dst[i] = (float)src[i] * scale;
}

// --- E4M3 -------------------------------------------------------------------------------------------
// A sign, four bits of exponent, three of fraction; 7f and ff are NaN, which nobody stores.

// LANES numbers divided by E4M3_UNIT: their bits in the place of those of another type, whose exponents
// count from elsewhere.  Subnormal ones are right too.
#if defined(__AVX2__) && TM_VECTOR_BYTES > 16
constexpr float E4M3_UNIT = 0x1p8f;  // fp16
#else
constexpr float E4M3_UNIT = 0x1p120f;  // fp32
#endif
TM_INLINE vf load_e4m3_units(const uint8_t *p) {
#if defined(__AVX512F__) && TM_VECTOR_BYTES == 64
  const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)), 7);
  return (vf)_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16((short)0xbf80)));
#elif defined(__AVX2__) && TM_VECTOR_BYTES == 32
  const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)p)), 7);
  return (vf)_mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16((short)0xbf80)));
#else
  return (vf)((load_bytes((const int8_t *)p) << 20) & (int32_t)0x87f00000);
#endif
}
TM_INLINE vf load_e4m3(const uint8_t *p) { return load_e4m3_units(p) * E4M3_UNIT; }

// The nearest E4M3 number to each |x| <= 448, halves to even, as a byte per lane.
TM_INLINE vi to_e4m3(vf x) {
  const vi bits = (vi)x, size = bits & 0x7fffffff;
  // Below 2^-6 they are the multiples of 2^-9; from there on, three bits of fraction are kept.
  const vi low = to_int(round((vf)size * 0x1p9f));
  const vi high = ((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - (120 << 3);
  return select((vf)size < 0x1p-6f, low, high) | ((bits >> 24) & 0x80);
}

}  // namespace mill
