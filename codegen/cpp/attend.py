"""Attend: causal grouped-query attention over the paged cache."""

from __future__ import annotations

from ...ir.plan import Attend
from ..text import fill
from .cache_write import cache_type, math_type
from .expr import literal
from .text import signature

HEADER = "attention.h"


def symbol(spec: Attend) -> str:
    window = f"_window{spec.window}" if spec.window else ""
    dims = f"h{spec.heads}_kv{spec.heads_kv}_d{spec.head_dim}_v{spec.value_dim}"
    alibi = "_alibi" if spec.slopes else ""
    return f"attend_{dims}_{spec.cache_format}{window}{alibi}"


def emit(spec: Attend, name: str) -> str:
    cache = spec.cache
    extras = ["const void *sinks"] * spec.sinks + ["const void *slopes"] * spec.slopes
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
        math=math_type(spec.cache_format),
        sees=f"p - {spec.window} < j <= p" if spec.window else "j <= p",
        codec=cache_type(spec.cache_format),
        row_bytes=cache.row_bytes,
        key_scale=cache.scale_offset,
        value_scale=cache.scale_offset + 4 * spec.heads_kv,
        bias=" + slopes[h] (j - p)" if spec.slopes else "",
        sinks="(const float *)sinks" if spec.sinks else "nullptr",
        slopes=", (const float *)slopes" if spec.slopes else "",
        slopes_member="\n  const float *slopes;" if spec.slopes else "",
        slopes_rows="\n" + SLOPES_ROWS if spec.slopes else "",
        slopes_panel=", nullptr, slope + r" if spec.slopes else "",
        sink=", sinks[head]" if spec.sinks else "",
        signature=signature("Rows<float> q", *extras, "const void *cache", "Rows<float> out"),
    )


SLOPES_ROWS = """
    float slope[PANELS * PANEL];
    for (int r = 0; r < PANELS * PANEL; r++) slope[r] = slopes[kv * GROUP + r % GROUP];
""".strip("\n")
TEMPLATE = """
// out[t, h] = softmax_j(q[t, h] . key[j, h / GROUP] * $scale$bias) value[j, h / GROUP]
// over keys $sees for a query at position p;  q [rows, $heads, $dim], out [rows, $heads, $value],
// cache row: keys [$heads_kv, $dim], values [$heads_kv, $value]
namespace $symbol {
constexpr int HEADS = $heads, HEADS_KV = $heads_kv, GROUP = HEADS / HEADS_KV;
constexpr int DIM = $dim, VALUE = $value, WINDOW = $window, ROW_BYTES = $row_bytes;
constexpr float SCALE = $scale, SOFTCAP = $softcap;
using Cache = $codec;
constexpr int SIZE = sizeof(Cache::Value);
using Math = $math;
using Inputs = Math::Panel::Inputs;
using KeysOf = KeyRows<Math, Cache, DIM, ROW_BYTES>;
using ValuesOf = KeyRows<Math, Cache, VALUE, ROW_BYTES>;

// A tile is some tokens of a sequence with the GROUP heads of one kv head: row r is token r / GROUP.
// Jobs that take part of its keys leave their results in slots.
constexpr int TOKENS = max(1, 64 / GROUP), ROWS = TOKENS * GROUP, PANELS = panels(ROWS);
constexpr int PITCH = round_up(VALUE, STEP), SLOT_ROWS = 4096;
constexpr size_t ROW = Inputs::bytes(DIM);
constexpr size_t SHARED = Partial::bytes(SLOT_ROWS, PITCH);
constexpr size_t LOCAL = KeysOf::BYTES + ValuesOf::BYTES +
                         Scratch::sizes<uint8_t>(PANEL * ROW, PANELS * PANEL * ROW) +
                         Scratch::sizes<float>(PANELS * PANEL) + BlockScratch::BYTES +
                         3 * Partial::bytes(ROWS, PITCH);

struct Call {
  Thread &th;
  const tm_args &a;
  Rows<float> q, out;
  const float *sinks;
  const void *cache;
  const Queries &queries;
  Partial slots;$slopes_member

  Partial slot(const Tile &tile, int kv, int parts, int i) const {
    return slots.row(((tile.row * HEADS_KV + tile.tokens * kv) * parts + tile.tokens * i) * GROUP);
  }

  // Part i of a tile's keys: [i * grain, (i + 1) * grain) blocks from its first on.
  void attend(const TileBatch &b, const Tile &tile, int kv, int grain, int i) const {
    const int parts = ceil_div(b.blocks, grain), begin = queries.begin_of(tile) + i * grain;
    const int end = min(begin + grain, queries.end_of(tile)), rows = tile.tokens * GROUP;
    if (begin >= end) return;
    Scratch scratch{th.local};
    KeysOf keys(scratch);
    ValuesOf values(scratch);
    uint8_t *row = scratch.take<uint8_t>(PANEL * ROW);
    uint8_t *panel = scratch.take<uint8_t>(PANELS * PANEL * ROW);
    float *newest = scratch.take<float>(PANELS * PANEL);
    const BlockScratch space = BlockScratch::take(scratch);
    const Partial span = Partial::take(scratch, ROWS, PITCH), block = Partial::take(scratch, ROWS, PITCH);
    const Partial own = Partial::take(scratch, ROWS, PITCH);
    const Partial all = parts == 1 ? own : slot(tile, kv, parts, i);
    for (int r = 0; r < rows; r++) {
      const float *x = q[tile.first + r / GROUP] + (kv * GROUP + r % GROUP) * DIM;
      Inputs::pack(row + r % PANEL * ROW, x, DIM);
      if ((r + 1) % PANEL == 0 || r + 1 == rows) panel_of_rows(row, ROW, panel + r / PANEL * PANEL * ROW);
    }$slopes_rows
    const Span<Cache> key_at{kv * DIM * SIZE, DIM, DIM, $key_scale + 4 * kv};
    const Span<Cache> value_at{(HEADS_KV * DIM + kv * VALUE) * SIZE, VALUE, VALUE, $value_scale + 4 * kv};
    const int p0 = a.positions[tile.first], from = max(begin, queries.oldest_of(tile));
    join_blocks(from, end, all, span, block, rows, [&](int at, const Partial &result) {
      const int base = at * KEYS, count = min(KEYS, p0 + tile.tokens - base);
      for (int j = 0; j < count; j++) {
        const uint8_t *from = cache_row(a, cache, ROW_BYTES, tile.sequence, base + j);
        keys.set(j, from, key_at);
        values.set(j, from, value_at);
        if (base + KEYS + j < p0 + tile.tokens) {  // rows of the next block: too far apart for the hardware
          const uint8_t *next = cache_row(a, cache, ROW_BYTES, tile.sequence, base + KEYS + j);
          prefetch(next + key_at.at, DIM * SIZE);
          prefetch(next + value_at.at, VALUE * SIZE);
        }
      }
      for (int r = 0; r < PANELS * PANEL; r++)
        newest[r] = (float)(p0 + min(r / GROUP, tile.tokens - 1) - base);
      for (int r = 0; r < rows; r += PANEL)
        attend_block<Math>({panel + r * ROW, keys.at, values.at, DIM, VALUE, count, min(PANEL, rows - r),
                            newest + r, SCALE, SOFTCAP, WINDOW$slopes_panel},
                           space, result.row(r), true);
    });
    if (parts == 1) finish(tile, kv, all);
  }

  void finish(const Tile &tile, int kv, const Partial &all) const {
    for (int r = 0; r < tile.tokens * GROUP; r++) {
      const int head = kv * GROUP + r % GROUP;
      const Partial mine = all.row(r);
      const float scale = inverse_total(*mine.peak, *mine.total$sink);
      float *to = out[tile.first + r / GROUP] + head * VALUE;
      for (int i = 0; i < VALUE; i += LANES) store_n(to + i, load(mine.sums + i) * scale, VALUE - i);
    }
  }
  void finish_slots(const TileBatch &b, const Tile &tile, int kv, int grain) const {
    const auto part = [&](int i) { return slot(tile, kv, ceil_div(b.blocks, grain), i); };
    const int blocks = queries.end_of(tile) - queries.begin_of(tile);
    join_slots(ceil_div(blocks, grain), grain, tile.tokens * GROUP, part);
    finish(tile, kv, part(0));
  }
};

$signature
  const tm_args &a = *th.args;
  Scratch shared{th.shared};
  Queries queries{a, TOKENS, MAX_ROWS, MAX_ROWS + 1, WINDOW};
  const Partial slots = Partial::take(shared, SLOT_ROWS, PITCH);
  const Call call{th, a, q, out, $sinks, cache, queries, slots$slopes};
  bool later = false;
  for (TileBatch b; queries.next(b); later = true) {
    const int tiles = b.count * HEADS_KV;
    const int grain = grain_of(tiles, b.blocks, SLOT_ROWS / (b.tokens * HEADS), th.count);
    const int parts = ceil_div(b.blocks, grain);
    if (later) th.barrier();
    for (Jobs jobs(th, tiles * parts); jobs.next();) {
      const int at = jobs.at / parts;
      call.attend(b, b.at[at / HEADS_KV], at % HEADS_KV, grain, jobs.at % parts);
    }
    if (parts == 1) continue;
    th.barrier();
    for (Jobs jobs(th, tiles); jobs.next();)
      call.finish_slots(b, b.at[jobs.at / HEADS_KV], jobs.at % HEADS_KV, grain);
  }
}
}  // namespace $symbol
"""
