// The paged KV cache (ir/cache.py): rows of values, then for int8 one fp32 scale per tile.
#pragma once
#include "pool.h"

namespace mill {

constexpr int PAGE = 64;

// Values [column, column + width) of a row; int8: their scales start at byte `scale`, one per `tile`.
struct Span {
  int column, width, tile, scale;
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
  static void encode(uint8_t *row, const Span &s, const float *x) {
    memcpy(row + (size_t)s.column * 4, x, (size_t)s.width * 4);
  }
  static void decode(const uint8_t *row, const Span &s, float *x) {
    memcpy(x, row + (size_t)s.column * 4, (size_t)s.width * 4);
  }
};

struct CacheBf16 {
  using Value = uint16_t;
  static void encode(uint8_t *row, const Span &s, const float *x) {
    uint16_t *out = (uint16_t *)row + s.column;
    for (int i = 0; i < s.width; i += LANES) store_bf16_n(out + i, load_n(x + i, s.width - i), s.width - i);
  }
  static void decode(const uint8_t *row, const Span &s, float *x) {
    const uint16_t *from = (const uint16_t *)row + s.column;
    int i = 0;
    for (; i + LANES <= s.width; i += LANES) store(x + i, load_bf16(from + i));
    widen(x + i, from + i, s.width - i);
  }
  static void decode(const uint8_t *row, const Span &s, uint16_t *x) {
    memcpy(x, row + (size_t)s.column * 2, (size_t)s.width * 2);
  }
};

struct CacheInt8 {
  using Value = int8_t;
  // scale = max |x| / 127; round to nearest even; a tile of zeros has scale 0.
  static void encode(uint8_t *row, const Span &s, const float *x) {
    int8_t *out = (int8_t *)row + s.column;
    for (int at = 0, tile = 0; at < s.width; at += s.tile, tile++) {
      const int n = min(s.tile, s.width - at);
      vf peak = {};
      for (int i = 0; i < n; i += LANES) peak = max(peak, abs(load_n(x + at + i, n - i)));
      const float scale = highest(peak) / 127.0f, divisor = scale == 0.0f ? 1.0f : scale;
      memcpy(row + s.scale + 4 * tile, &scale, 4);
      for (int i = 0; i < n; i += LANES) {
        const vf value = round(load_n(x + at + i, n - i) / divisor);
        const vi q = to_int(min(max(value, splat(-127.0f)), splat(127.0f)));
        int8_t all[LANES];
        store_bytes(all, q);
        memcpy(out + at + i, all, (size_t)min(LANES, n - i));
      }
    }
  }
  static void decode(const uint8_t *row, const Span &s, float *x) { decode_as(row, s, x); }
  static void decode(const uint8_t *row, const Span &s, uint16_t *x) { decode_as(row, s, x); }

 private:
  template <class T>
  static TM_INLINE void decode_as(const uint8_t *row, const Span &s, T *x) {
    const int8_t *q = (const int8_t *)row + s.column;
    for (int at = 0, tile = 0; at < s.width; at += s.tile, tile++) {
      const int n = min(s.tile, s.width - at);
      float scale;
      memcpy(&scale, row + s.scale + 4 * tile, 4);
      int i = 0;
      for (; i + LANES <= n; i += LANES) put(x + at + i, to_float(load_bytes(q + at + i)) * scale);
      for (; i < n; i++) put(x + at + i, (float)q[at + i] * scale);
    }
  }
  static TM_INLINE void put(float *p, vf x) { store(p, x); }
  static TM_INLINE void put(float *p, float x) { *p = x; }
  static TM_INLINE void put(uint16_t *p, vf x) { store_bf16(p, x); }
  static TM_INLINE void put(uint16_t *p, float x) { *p = to_bf16(x); }
};

}  // namespace mill
