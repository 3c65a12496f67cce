"""Attend: causal grouped-query attention over the paged cache."""

from __future__ import annotations

from ...ir.plan import Attend
from .cache_write import cache_type
from .expr import literal
from .text import fill

HEADER = "attention.h"


def symbol(spec: Attend) -> str:
    window = f"_window{spec.window}" if spec.window else ""
    dims = f"h{spec.heads}_kv{spec.heads_kv}_d{spec.head_dim}_v{spec.value_dim}"
    return f"attend_{dims}_{spec.cache_format}{window}"


def emit(spec: Attend, name: str) -> str:
    cache = spec.cache
    return fill(
        TEMPLATE,
        symbol=name,
        heads=spec.heads,
        heads_kv=spec.heads_kv,
        dim=spec.head_dim,
        value=spec.value_dim,
        window=spec.window,
        scale=literal(spec.scale),
        softcap=literal(spec.softcap),
        sees=f"p - {spec.window} < j <= p" if spec.window else "j <= p",
        codec=cache_type(spec.cache_format),
        row_bytes=cache.row_bytes,
        key_scale=cache.scale_offset,
        value_scale=cache.scale_offset + 4 * spec.heads_kv,
        sinks=", const void *sinks" if spec.sinks else "",
        sink=", ((const float *)sinks)[head]" if spec.sinks else "",
    )


TEMPLATE = """
// out[t, h] = softmax_j(q[t, h] . key[j, h / GROUP] * $scale) value[j, h / GROUP]
// over keys $sees for a query at position p;  q [rows, $heads, $dim], out [rows, $heads, $value],
// cache row: keys [$heads_kv, $dim], values [$heads_kv, $value]
namespace $symbol {
constexpr int HEADS = $heads, HEADS_KV = $heads_kv, GROUP = HEADS / HEADS_KV;
constexpr int DIM = $dim, VALUE = $value, WINDOW = $window, ROW_BYTES = $row_bytes;
constexpr float SCALE = $scale, SOFTCAP = $softcap;
constexpr int TOKENS = max(1, 64 / GROUP), ROWS = TOKENS * GROUP;
constexpr int KEY_PITCH = round_up(DIM, LANES), VALUE_PITCH = round_up(VALUE, LANES);
constexpr int TILE_FLOATS = PAGE * max(KEY_PITCH, VALUE_PITCH);
using Cache = $codec;
constexpr size_t SHARED = 0;
constexpr size_t LOCAL = Scratch::sizes<float>(ROWS * DIM, TILE_FLOATS, KEY_PITCH * PAGE, ROWS * PAGE,
                                               ROWS * VALUE_PITCH, ROWS, ROWS, ROWS);

TM_NOINLINE void run(Thread &th, int, Rows<float> q$sinks, const void *cache,
                     Rows<float> out) {
  const tm_args &a = *th.args;
  Scratch scratch{th.local};
  float *qs = scratch.take<float>(ROWS * DIM);
  float *tile = scratch.take<float>(TILE_FLOATS);
  float *keys = scratch.take<float>(KEY_PITCH * PAGE);
  float *s = scratch.take<float>(ROWS * PAGE);
  float *sums = scratch.take<float>(ROWS * VALUE_PITCH);
  float *peak = scratch.take<float>(ROWS), *total = scratch.take<float>(ROWS);
  float *shrink = scratch.take<float>(ROWS);

  // A job is a tile of queries with the GROUP heads of one kv head: row r is token r / GROUP.
  QueryTiles tiles(a, TOKENS);
  for (int job = th.first_job(); tiles.seek(job / HEADS_KV); job = th.next_job()) {
    const int kv = job % HEADS_KV, rows = tiles.tokens * GROUP, p0 = a.positions[tiles.first];
    const Span key_at{kv * DIM, DIM, DIM, $key_scale + 4 * kv};
    const Span value_at{HEADS_KV * DIM + kv * VALUE, VALUE, VALUE, $value_scale + 4 * kv};
    for (int r = 0; r < rows; r++) {
      const int head = kv * GROUP + r % GROUP;
      memcpy(qs + r * DIM, q[tiles.first + r / GROUP] + head * DIM, DIM * sizeof(float));
      peak[r] = -__builtin_inff();
      total[r] = 0.0f;
    }
    memset(sums, 0, (size_t)rows * VALUE_PITCH * sizeof(float));

    // Keys [0, end) exist; the tile's first query sees them from `oldest` on.
    const int end = p0 + tiles.tokens, oldest = WINDOW ? max(0, p0 - WINDOW + 1) : 0;
    for (int base = oldest / PAGE * PAGE; base < end; base += PAGE) {
      const uint8_t *page = cache_row(a, cache, ROW_BYTES, tiles.sequence, base);
      const int count = min(PAGE, end - base);
      load_page<Cache>(page, ROW_BYTES, count, key_at, tile, KEY_PITCH);
      transpose_page(tile, KEY_PITCH, KEY_PITCH, keys);
      scores(qs, DIM, rows, keys, DIM, s);
      for (int r = 0; r < rows; r++) {
        const int p = p0 + r / GROUP - base, low = WINDOW ? max(0, p - WINDOW + 1) : 0;
        shrink[r] = softmax_page(s + r * PAGE, low, min(count, p + 1), SCALE, SOFTCAP, peak[r],
                                 total[r]);
      }
      load_page<Cache>(page, ROW_BYTES, count, value_at, tile, VALUE_PITCH);
      outer<false>(s, PAGE, rows, tile, VALUE_PITCH, PAGE, shrink, sums, VALUE_PITCH,
                   VALUE_PITCH);
    }
    for (int r = 0; r < rows; r++) {
      const int head = kv * GROUP + r % GROUP;
      const float scale = inverse_total(peak[r], total[r]$sink);
      float *to = out[tiles.first + r / GROUP] + head * VALUE;
      for (int i = 0; i < VALUE; i += LANES)
        store_n(to + i, load(sums + r * VALUE_PITCH + i) * scale, VALUE - i);
    }
  }
}
}  // namespace $symbol
"""
