// CacheWrite: store each token's parts in its row of the paged cache.
#pragma once
#include "pool.h"
#include "cache.h"

namespace mill {

// cache[block_table[b, p / 64], p % 64] = key [32], value [32] of token t, at position p of sequence b
namespace cache_write_key32_value32_int8 {
constexpr int ROW_BYTES = 80;
constexpr size_t SHARED = 0, LOCAL = 0;

TM_NOINLINE void run(Thread &th, int rows, Rows<float> p0, Rows<float> p1, void *cache) {
  const tm_args &a = *th.args;
  int b = 0;
  for (int t = th.share(rows, 0); t < th.share(rows, 1); t++) {
    b = sequence_of(a.starts, t, b);
    uint8_t *row = cache_row(a, cache, ROW_BYTES, b, a.positions[t]);
    Span<CacheInt8>{0, 32, 16, 64}.encode(row, p0[t]);
    Span<CacheInt8>{32, 32, 16, 72}.encode(row, p1[t]);
  }
}
}  // namespace cache_write_key32_value32_int8

// cache[block_table[b, p / 64], p % 64] = latent [24], rope [8] of token t, at position p of sequence b
namespace cache_write_latent24_rope8_fp8 {
constexpr int ROW_BYTES = 48;
constexpr size_t SHARED = 0, LOCAL = 0;

TM_NOINLINE void run(Thread &th, int rows, Rows<float> p0, Rows<float> p1, void *cache) {
  const tm_args &a = *th.args;
  int b = 0;
  for (int t = th.share(rows, 0); t < th.share(rows, 1); t++) {
    b = sequence_of(a.starts, t, b);
    uint8_t *row = cache_row(a, cache, ROW_BYTES, b, a.positions[t]);
    Span<CacheFp8>{0, 24, 128, 40}.encode(row, p0[t]);
    Span<CacheBf16>{24, 8, 128, 0}.encode(row, p1[t]);
  }
}
}  // namespace cache_write_latent24_rope8_fp8

}  // namespace mill
