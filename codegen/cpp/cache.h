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

struct CacheFp32 {
  static void encode(uint8_t *row, const Span &s, const float *x) {
    memcpy(row + (size_t)s.column * 4, x, (size_t)s.width * 4);
  }
  static void decode(const uint8_t *row, const Span &s, float *x) {
    memcpy(x, row + (size_t)s.column * 4, (size_t)s.width * 4);
  }
};

struct CacheBf16 {
  static void encode(uint8_t *row, const Span &s, const float *x) {
    uint16_t *out = (uint16_t *)row + s.column;
    for (int i = 0; i < s.width; i++) out[i] = to_bf16(x[i]);
  }
  static void decode(const uint8_t *row, const Span &s, float *x) {
    widen(x, (const uint16_t *)row + s.column, s.width);
  }
};

struct CacheInt8 {
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
        for (int j = 0; j < min(LANES, n - i); j++) out[at + i + j] = (int8_t)q[j];
      }
    }
  }
  static void decode(const uint8_t *row, const Span &s, float *x) {
    const int8_t *q = (const int8_t *)row + s.column;
    for (int at = 0, tile = 0; at < s.width; at += s.tile, tile++) {
      const int n = min(s.tile, s.width - at);
      float scale;
      memcpy(&scale, row + s.scale + 4 * tile, 4);
      for (int i = 0; i < n; i++) x[at + i] = (float)q[at + i] * scale;
    }
  }
};

// tile[j][0:width] = rows j < count of a page; rows past them are zero, for what the cache holds there
// (anything, NaN too) must not reach a sum, not even times a probability of 0.
template <class C>
inline void load_page(const uint8_t *page, size_t row_bytes, int count, const Span &s, float *tile,
                      int pitch) {
  for (int j = 0; j < count; j++) C::decode(page + j * row_bytes, s, tile + (size_t)j * pitch);
  for (int j = count; j < PAGE; j++) memset(tile + (size_t)j * pitch, 0, (size_t)s.width * 4);
}

}  // namespace mill
