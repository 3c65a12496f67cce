// The paged KV cache (ir/cache.py): rows of values, then for INT8 and FP8 one fp32 scale per tile.
#pragma once
#include "pool.h"

namespace mill {

constexpr int PAGE = 64;

// `width` values from byte `at` of a row on, as Codec stores them.  INT8 and FP8: their scales start at byte
// `scale`, one per `tile`.
template <class Codec>
struct Span {
  int at, width, tile, scale;
  void encode(uint8_t *row, const float *x) const { Codec::encode(row, *this, x); }
  template <class T>
  void decode(const uint8_t *row, T *x) const {
    Codec::decode(row, *this, x);
  }
};

// Row of the token at `position` of a sequence; at a multiple of PAGE, its whole page.
TM_INLINE uint8_t *cache_row(const tm_args &a, const void *cache, size_t row_bytes, int sequence,
                             int position) {
  const size_t page = (size_t)a.block_table[(size_t)sequence * a.table_stride + position / PAGE];
  return (uint8_t *)cache + (page * PAGE + position % PAGE) * row_bytes;
}

// The sequence that owns token t, searched from `from` on.
TM_INLINE int sequence_of(const int32_t *starts, int t, int from) {
  while (starts[from + 1] <= t) from++;
  return from;
}

// A codec says how values are stored: as `Value`, encoded from floats, decoded as floats or bf16.

struct CacheFp32 {
  using Value = float;
  using At = Span<CacheFp32>;
  static void encode(uint8_t *row, const At &s, const float *x) { memcpy(row + s.at, x, (size_t)s.width * 4); }
  static void decode(const uint8_t *row, const At &s, float *x) { memcpy(x, row + s.at, (size_t)s.width * 4); }
};

struct CacheBf16 {
  using Value = uint16_t;
  using At = Span<CacheBf16>;
  static void encode(uint8_t *row, const At &s, const float *x) {
    uint16_t *out = (uint16_t *)(row + s.at);
    for (int i = 0; i < s.width; i += LANES) store_bf16_n(out + i, load_n(x + i, s.width - i), s.width - i);
  }
  static void decode(const uint8_t *row, const At &s, float *x) {
    const uint16_t *from = (const uint16_t *)(row + s.at);
    int i = 0;
    for (; i + LANES <= s.width; i += LANES) store(x + i, load_bf16(from + i));
    widen(x + i, from + i, s.width - i);
  }
  static void decode(const uint8_t *row, const At &s, uint16_t *x) {
    memcpy(x, row + s.at, (size_t)s.width * 2);
  }
};

// scale = max |x| / MOST, and values in units of it; a tile of zeros has scale 0, one that holds what is not
// finite has scale NaN.
template <class Number>
struct CacheScaled {
  using Value = uint8_t;
  using At = Span<CacheScaled>;
  static void encode(uint8_t *row, const At &s, const float *x) {
    uint8_t *out = row + s.at;
    for (int at = 0, tile = 0; at < s.width; at += s.tile, tile++) {
      const int n = min(s.tile, s.width - at);
      vf peak = {};
      for (int i = 0; i < n; i += LANES) peak = max(peak, abs(load_n(x + at + i, n - i)));
      const float scale = highest(peak) / Number::MOST + sum(peak - peak);
      const float divisor = scale == 0.0f ? 1.0f : scale;
      memcpy(row + s.scale + 4 * tile, &scale, 4);
      for (int i = 0; i < n; i += LANES) {
        const vf value = load_n(x + at + i, n - i) / divisor;
        int8_t all[LANES];
        store_bytes(all, Number::round(min(max(value, splat(-Number::MOST)), splat(Number::MOST))));
        memcpy(out + at + i, all, (size_t)min(LANES, n - i));
      }
    }
  }
  static void decode(const uint8_t *row, const At &s, float *x) { decode_as(row, s, x); }
  static void decode(const uint8_t *row, const At &s, uint16_t *x) { decode_as(row, s, x); }

 private:
  template <class T>
  static TM_INLINE void decode_as(const uint8_t *row, const At &s, T *x) {
    const uint8_t *q = row + s.at;
    for (int at = 0, tile = 0; at < s.width; at += s.tile, tile++) {
      const int n = min(s.tile, s.width - at);
      float scale;
      memcpy(&scale, row + s.scale + 4 * tile, 4);
      int i = 0;
      for (; i + LANES <= n; i += LANES) put(x + at + i, Number::times(q + at + i, scale), LANES);
      if (i == n) continue;
      uint8_t rest[LANES] = {};
      memcpy(rest, q + at + i, (size_t)(n - i));
      put(x + at + i, Number::times(rest, scale), n - i);
    }
  }
  static TM_INLINE void put(float *p, vf x, int n) { store_n(p, x, n); }
  static TM_INLINE void put(uint16_t *p, vf x, int n) { store_bf16_n(p, x, n); }
};

struct Int8Number {
  static constexpr float MOST = 127.0f;
  static TM_INLINE vi round(vf x) { return to_int(::mill::round(x)); }
  static TM_INLINE vf times(const uint8_t *p, float scale) { return to_float(load_bytes((const int8_t *)p)) * scale; }
};

struct E4m3Number {
  static constexpr float MOST = 448.0f;
  static TM_INLINE vi round(vf x) { return to_e4m3(x); }
  static TM_INLINE vf times(const uint8_t *p, float scale) {
    // One multiplication, where a scale leaves room for the unit: it is at most 2^128 / 448.
    if (E4M3_UNIT < MOST) return load_e4m3_units(p) * (scale * E4M3_UNIT);
    return load_e4m3(p) * scale;
  }
};

using CacheInt8 = CacheScaled<Int8Number>;
using CacheFp8 = CacheScaled<E4m3Number>;

}  // namespace mill
