"""LatentAttend: multi-head latent attention, absorbed for few queries and expanded for long chunks.

Absorbed (the heads share the cached latents): q_lat = q_nope w_uk, score = q_lat . c + q_pe . k_pe, out =
w_uv (sum p c).  Expanded (one head at a time, all queries of the chunk): k = [w_uk c, k_pe], v = w_uv c.
"""

from __future__ import annotations

from ...ir.plan import LatentAttend
from ..text import fill
from .cache_write import cache_type, math_type, spans
from .expr import literal
from .text import signature, weight_params, weight_parts, weight_type

HEADER = "attention.h"


def symbol(spec: LatentAttend) -> str:
    dims = f"h{spec.heads}_n{spec.nope}_r{spec.rope}_l{spec.latent}_v{spec.value}"
    return f"latent_attend_{dims}_{spec.cache_format}"


def emit(spec: LatentAttend, name: str) -> str:
    latent_span, rope_span = spans(spec.cache)
    ups = [*weight_params(spec.up_format, "w_uk_"), *weight_params(spec.up_format, "w_uv_")]
    return fill(
        TEMPLATE,
        symbol=name,
        heads=spec.heads,
        nope=spec.nope,
        rope=spec.rope,
        latent=spec.latent,
        value=spec.value,
        scale=literal(spec.scale),
        absorb_below=spec.absorb_below,
        row_bytes=spec.cache.row_bytes,
        codec=cache_type(spec.cache_format),
        math=math_type(spec.cache_format),
        up=weight_type(spec.up_format),
        up_keys="Unscaled" if spec.up_format == "int8" else weight_type(spec.up_format),
        latent_span=latent_span,
        rope_span=rope_span,
        signature=signature("Rows<float> q", *ups, "const void *cache", "Rows<float> out"),
        w_uk=weight_parts(spec.up_format, "w_uk_"),
        w_uv=weight_parts(spec.up_format, "w_uv_"),
    )


TEMPLATE = """
// out[t, h] = softmax_j($scale * (q_nope w_uk[h] . c[j] + q_pe . k_pe[j])) w_uv[h] c[j]
// over keys j <= position of t;  q [rows, $heads, $nope + $rope], out [rows, $heads, $value],
// w_uk [$heads, $nope, $latent], w_uv [$heads, $value, $latent], cache row: c [$latent], k_pe [$rope]
namespace $symbol {
constexpr int HEADS = $heads, NOPE = $nope, ROPE = $rope, QUERY = NOPE + ROPE;
constexpr int LATENT = $latent, VALUE = $value, ABSORB_BELOW = $absorb_below, ROW_BYTES = $row_bytes;
constexpr float SCALE = $scale;
constexpr int WIDTH = LATENT + ROPE, LATENT_PITCH = round_up(LATENT, STEP);
constexpr auto LATENT_AT = $latent_span;
constexpr auto ROPE_AT = $rope_span;
using Cache = $codec;
using Math = $math;
using Value = Math::Value;
using Packed = Math::Panel;
using Up = $up;
using UpKeys = $up_keys;
using Latents = KeyRows<Math, Cache, WIDTH, compete(ROW_BYTES)>;

// Absorbed: a tile is some tokens of a sequence with all heads, row r is head r % HEADS of token
// r / HEADS.  Its jobs leave results of their blocks of keys in slots.
constexpr int TOKENS = max(1, 64 / HEADS), ROWS = TOKENS * HEADS, PANELS = panels(ROWS);
constexpr int BATCH = 64;                                // tokens whose queries are in latent space at once
constexpr int SLOT_ROWS = max(BATCH * HEADS, 4096);
constexpr size_t ROW = Packed::Inputs::bytes(WIDTH);     // a query in latent space
constexpr size_t IN = Up::Inputs::bytes(NOPE), MIXED = Up::Inputs::bytes(LATENT);
constexpr int ROW_FLOATS = steps(WIDTH) * STEP;
constexpr size_t SHARED = Scratch::sizes<uint8_t>((BATCH * HEADS + PANEL) * ROW) +
                          Partial::bytes(SLOT_ROWS, LATENT_PITCH);
constexpr size_t QUERY_LOCAL =
    Scratch::sizes<uint8_t>(BATCH * IN) + Scratch::sizes<float>(NOPE, BATCH * ROW_FLOATS);
constexpr size_t ABSORBED_LOCAL = Latents::BYTES + Scratch::sizes<uint8_t>(PANELS * PANEL * ROW) +
                                  Scratch::sizes<float>(PANELS * PANEL) + BlockScratch::bytes(1) +
                                  2 * Partial::bytes(ROWS, LATENT_PITCH);
constexpr size_t OUT_LOCAL =
    Scratch::sizes<uint8_t>(BATCH * MIXED) + Scratch::sizes<float>(LATENT_PITCH, BATCH * PANEL);

// Expanded: a job is one head with all queries of a sequence, which stand in panels of 16.
constexpr int KEY_PITCH = steps(QUERY) * STEP, VALUE_PITCH = steps(VALUE) * STEP;
constexpr size_t KEY_PANEL = steps(LATENT) * Packed::STEP_BYTES;  // of w_uk or w_uv, made for Math
constexpr size_t QUERY_ROW = Packed::Inputs::bytes(QUERY);
constexpr int QUERIES = round_up(MAX_ROWS, PANEL);
constexpr size_t EXPANDED_LOCAL =
    Latents::BYTES + Scratch::sizes<uint8_t>(panels(NOPE) * KEY_PANEL, panels(VALUE) * KEY_PANEL) +
    Scratch::sizes<Value>(KEYS * KEY_PITCH, KEYS * VALUE_PITCH) +
    Scratch::sizes<float>(KEYS * PANEL, PANEL) +
    Scratch::sizes<uint8_t>(PANEL * QUERY_ROW, QUERIES * QUERY_ROW) + BlockScratch::bytes(1) +
    Partial::bytes(QUERIES, VALUE_PITCH);

constexpr size_t LOCAL = larger(larger(QUERY_LOCAL, ABSORBED_LOCAL), larger(OUT_LOCAL, EXPANDED_LOCAL));

struct Call {
  Thread &th;
  const tm_args &a;
  Rows<float> q, out;
  Weight uk, uv;
  const void *cache;
  uint8_t *queries;  // [tokens of the batch, HEADS] packed rows
  Partial slots;

  int batch_grain(const TileBatch &b) const {
    return grain_of(b.count, b.blocks, SLOT_ROWS / (b.tokens * HEADS), th.count);
  }
  // Where part i of a tile's keys leaves its result.
  Partial slot(const Tile &tile, int parts, int i) const {
    return slots.row((tile.row * parts + i * tile.tokens) * HEADS);
  }
  void fetch(int sequence, int first, int count, Latents &to) const {
    for (int j = 0; j < count; j++)
      to.set(j, cache_row(a, cache, ROW_BYTES, sequence, first + j), LATENT_AT, ROPE_AT);
  }

  // q_lat = q_nope w_uk[h] and q_pe, packed.
  void lower(const TileBatch &b, int h) const {
    Scratch scratch{th.local};
    uint8_t *in = scratch.take<uint8_t>(BATCH * IN);
    float *scaled = scratch.take<float>(NOPE), *rows = scratch.take<float>(BATCH * ROW_FLOATS);
    const UpKeys w{expert_weight<UpKeys>(uk.q, nullptr, panels(LATENT), LATENT, NOPE, h)};
    const uint8_t *xs[BATCH];
    const float *head[BATCH];
    for (int i = 0; i < b.count; i++)
      for (int t = 0; t < b.at[i].tokens; t++) head[b.at[i].row + t] = q[b.at[i].first + t] + h * QUERY;
    for (int t = 0; t < b.tokens; t++) {
      const float *x = head[t];
      if (Up::INTEGER) {
        for (int i = 0; i < NOPE; i++) scaled[i] = x[i] * ((const float *)uk.scale)[h * NOPE + i];
        x = scaled;
      }
      UpKeys::Inputs::pack(in + t * IN, x, NOPE);
      xs[t] = in + t * IN;
    }
    for (int panel = 0; panel < panels(LATENT); panel++)
      product(w, panel, xs, b.tokens, rows + panel * PANEL, ROW_FLOATS);
    for (int t = 0; t < b.tokens; t++) {
      memcpy(rows + t * ROW_FLOATS + LATENT, head[t] + NOPE, ROPE * sizeof(float));
      Packed::Inputs::pack(queries + (size_t)(t * HEADS + h) * ROW, rows + t * ROW_FLOATS, WIDTH);
    }
  }

  // Part i of a tile's keys.
  void absorbed(const Queries &queries_of, const TileBatch &b, const Tile &tile, int grain, int i) const {
    Scratch scratch{th.local};
    Latents latents(scratch);
    uint8_t *panel = scratch.take<uint8_t>(PANELS * PANEL * ROW);
    float *newest = scratch.take<float>(PANELS * PANEL);
    const BlockScratch space = BlockScratch::take(scratch, 1);
    const Partial span = Partial::take(scratch, ROWS, LATENT_PITCH);
    const Partial block = Partial::take(scratch, ROWS, LATENT_PITCH);
    const int rows = tile.tokens * HEADS, p0 = a.positions[tile.first];
    const int end = queries_of.end_of(tile), from = i * grain, to = min(from + grain, end);
    if (from >= to) return;
    for (int r = 0; r < rows; r += PANEL)
      panel_of_rows(queries + (size_t)(tile.row * HEADS + r) * ROW, ROW, panel + r * ROW);
    const Partial all = slot(tile, ceil_div(b.blocks, grain), i);
    join_blocks(from, to, all, span, block, rows, [&](int at, const Partial &result) {
      const int base = at * KEYS, count = min(KEYS, p0 + tile.tokens - base);
      fetch(tile.sequence, base, count, latents);
      for (int r = 0; r < PANELS * PANEL; r++)
        newest[r] = (float)(p0 + min(r / HEADS, tile.tokens - 1) - base);
      Ahead ahead;
      if (at + 1 < end) {
        ahead.at = cache_row(a, cache, ROW_BYTES, tile.sequence, base + KEYS);
        ahead.end = ahead.at + KEYS * ROW_BYTES;
      }
      for (int r = 0; r < rows; r += PANEL)
        attend_block<Math>({panel + r * ROW, latents.at, latents.at, WIDTH, LATENT,
                            {count, min(PANEL, rows - r), newest + r, SCALE}, &ahead},
                           space, result.row(r), true);
    });
  }

  // out = w_uv[h] (what the slots hold, joined).
  void raise(const Queries &queries_of, const TileBatch &b, int grain, int h) const {
    Scratch scratch{th.local};
    uint8_t *mixed = scratch.take<uint8_t>(BATCH * MIXED);
    float *row = scratch.take<float>(LATENT_PITCH), *y = scratch.take<float>(BATCH * PANEL);
    const Up w{expert_weight<Up>(uv.q, uv.scale, panels(VALUE), VALUE, LATENT, h)};
    const uint8_t *xs[BATCH];
    float *to[BATCH];
    for (int i = 0; i < b.count; i++) {
      const Tile &tile = b.at[i];
      for (int t = 0; t < tile.tokens; t++) {
        const auto part = [&](int j) {
          return slot(tile, ceil_div(b.blocks, grain), j).row(t * HEADS + h);
        };
        join_slots(ceil_div(queries_of.end_of(tile), grain), grain, 1, part);
        const Partial all = part(0);
        const float scale = inverse_total(*all.peak, *all.total);
        for (int c = 0; c < LATENT_PITCH; c += LANES) store(row + c, load(all.sums + c) * scale);
        const int at = tile.row + t;
        Up::Inputs::pack(mixed + at * MIXED, row, LATENT);
        xs[at] = mixed + at * MIXED;
        to[at] = out[tile.first + t] + h * VALUE;
      }
    }
    for (int panel = 0; panel < panels(VALUE); panel++) {
      product(w, panel, xs, b.tokens, y, PANEL);
      const int n0 = panel * PANEL, count = min(PANEL, VALUE - n0);
      for (int t = 0; t < b.tokens; t++)
        for (int n = 0; n < count; n += LANES) store_n(to[t] + n0 + n, load(y + t * PANEL + n), count - n);
    }
  }

  // Panels of w_uk[h] for Math, turned: rows are nope, inputs latents.
  void turn_keys(int h, uint8_t *to) const {
    const Up w{expert_weight<Up>(uk.q, nullptr, panels(LATENT), LATENT, NOPE, h)};
    alignas(64) float tile[PANEL * PANEL], turned[PANEL * PANEL];
    memset(to, 0, panels(NOPE) * KEY_PANEL);
    for (int at = 0; at < panels(LATENT) * panels(NOPE); at++) {
      const int c = at / panels(NOPE), n = at % panels(NOPE);
      const uint8_t *panel = (const uint8_t *)w.q + c * steps(NOPE) * Up::STEP_BYTES;
      for (int i = 0; i < PANEL; i++)
        for (int v = 0; v < VECS; v++) {
          const int row = n * PANEL + i;
          vf x = input_of<Up>(panel, row, v);
          if (Up::INTEGER) x *= row < NOPE ? ((const float *)uk.scale)[h * NOPE + row] : 0.0f;
          store(tile + i * PANEL + v * LANES, x);
        }
      panel_of_rows((const uint8_t *)tile, sizeof(tile) / PANEL, (uint8_t *)turned);
      for (int i = 0; i < PANEL; i += 2)
        for (int v = 0; v < VECS; v++) {
          const float *pair = turned + i * PANEL + v * LANES;
          Math::put(to + n * KEY_PANEL, c * PANEL + i, v, load(pair), load(pair + PANEL));
        }
    }
  }
  // Panels of w_uv[h] for Math: as they are stored, or made at `to`.
  const uint8_t *value_panels(int h, uint8_t *to) const {
    const Up w{expert_weight<Up>(uv.q, uv.scale, panels(VALUE), VALUE, LATENT, h)};
    if (same<Up, Packed>) return (const uint8_t *)w.q;
    for (int n = 0; n < panels(VALUE); n++) {
      const uint8_t *panel = (const uint8_t *)w.q + n * steps(LATENT) * Up::STEP_BYTES;
      for (int v = 0; v < VECS; v++) {
        vf scale = splat(1.0f);
        if (Up::INTEGER) scale = load((const float *)w.scale + n * PANEL + v * LANES);
        for (int i = 0; i < steps(LATENT) * STEP; i += 2)
          Math::put(to + n * KEY_PANEL, i, v, input_of<Up>(panel, i, v) * scale,
                    input_of<Up>(panel, i + 1, v) * scale);
      }
    }
    return to;
  }

  // rows[j] = w latents[j], `pitch` values apart
  static void expand(const uint8_t *w, int n, const Latents &latents, int count, float *y, Value *rows,
                     int pitch) {
    const Packed weight{{w, nullptr, n, LATENT}};
    for (int panel = 0; panel < panels(n); panel++) {
      product(weight, panel, latents.at, count, y, PANEL);
      for (int j = 0; j < count; j++)
        for (int i = 0; i < PANEL; i += LANES)
          Math::put_row(rows + j * pitch + panel * PANEL + i, load(y + j * PANEL + i));
    }
  }

  // All queries [first, first + tokens) of one sequence, head h.
  void expanded(int sequence, int first, int tokens, int h) const {
    Scratch scratch{th.local};
    Latents latents(scratch);
    uint8_t *w_k = scratch.take<uint8_t>(panels(NOPE) * KEY_PANEL);
    uint8_t *w_v = scratch.take<uint8_t>(panels(VALUE) * KEY_PANEL);
    Value *keys = scratch.take<Value>(KEYS * KEY_PITCH), *values = scratch.take<Value>(KEYS * VALUE_PITCH);
    float *y = scratch.take<float>(KEYS * PANEL), *newest = scratch.take<float>(PANEL);
    uint8_t *row = scratch.take<uint8_t>(PANEL * QUERY_ROW);
    uint8_t *panel = scratch.take<uint8_t>(QUERIES * QUERY_ROW);
    const BlockScratch space = BlockScratch::take(scratch, 1);
    const Partial all = Partial::take(scratch, QUERIES, VALUE_PITCH);

    turn_keys(h, w_k);
    const uint8_t *value_weight = value_panels(h, w_v);
    memset(keys, 0, KEYS * KEY_PITCH * sizeof(Value));
    for (int t0 = 0; t0 < tokens; t0 += PANEL) {
      for (int t = 0; t < min(PANEL, tokens - t0); t++)
        Packed::Inputs::pack(row + t * QUERY_ROW, q[first + t0 + t] + h * QUERY, QUERY);
      panel_of_rows(row, QUERY_ROW, panel + t0 * QUERY_ROW);
    }
    const uint8_t *key_rows[KEYS + 1], *value_rows[KEYS + 1];
    for (int j = 0; j <= KEYS; j++) {
      key_rows[j] = (const uint8_t *)(keys + min(j, KEYS - 1) * KEY_PITCH);
      value_rows[j] = (const uint8_t *)(values + min(j, KEYS - 1) * VALUE_PITCH);
    }
    const int p0 = a.positions[first];
    for (int base = 0; base < p0 + tokens; base += KEYS) {
      const int here = min(KEYS, p0 + tokens - base);
      fetch(sequence, base, here, latents);
      expand(w_k, NOPE, latents, here, y, keys, KEY_PITCH);
      expand(value_weight, VALUE, latents, here, y, values, VALUE_PITCH);
      for (int j = 0; j < here; j++)
        memcpy(keys + j * KEY_PITCH + NOPE, latents.at[j] + LATENT * sizeof(Value), ROPE * sizeof(Value));
      if (here % 2) memset(values + here * VALUE_PITCH, 0, VALUE_PITCH * sizeof(Value));
      // Queries before this block see none of it.
      for (int t0 = max(0, base - p0) / PANEL * PANEL; t0 < tokens; t0 += PANEL) {
        const int rows = min(PANEL, tokens - t0);
        for (int r = 0; r < PANEL; r++) newest[r] = (float)(p0 + t0 + min(r, rows - 1) - base);
        attend_block<Math>({panel + t0 * QUERY_ROW, key_rows, value_rows, QUERY, VALUE,
                            {min(here, p0 + t0 + rows - base), rows, newest, SCALE}},
                           space, all.row(t0), base == 0);
      }
    }
    for (int t = 0; t < tokens; t++) {
      const Partial mine = all.row(t);
      const float scale = inverse_total(*mine.peak, *mine.total);
      float *to = out[first + t] + h * VALUE;
      for (int i = 0; i < VALUE; i += LANES) store_n(to + i, load(mine.sums + i) * scale, VALUE - i);
    }
  }
};

$signature
  const tm_args &a = *th.args;
  Scratch shared{th.shared};
  uint8_t *queries = shared.take<uint8_t>((BATCH * HEADS + PANEL) * ROW);
  const Partial slots = Partial::take(shared, SLOT_ROWS, LATENT_PITCH);
  const Weight uk{$w_uk, LATENT, NOPE}, uv{$w_uv, VALUE, LATENT};
  const Call call{th, a, q, out, uk, uv, cache, queries, slots};

  int chunks = 0;
  for (int b = 0; b < a.sequences; b++) chunks += a.starts[b + 1] - a.starts[b] >= ABSORB_BELOW;
  for (Jobs jobs(th, chunks * HEADS); chunks && jobs.next();) {
    int b = -1;
    for (int left = jobs.at / HEADS; left >= 0; left -= a.starts[b + 1] - a.starts[b] >= ABSORB_BELOW) b++;
    call.expanded(b, a.starts[b], a.starts[b + 1] - a.starts[b], jobs.at % HEADS);
  }

  bool later = chunks;
  Queries few{a, TOKENS, BATCH, 1, ABSORB_BELOW - 1, 0};
  for (TileBatch b; few.next(b); later = true) {
    const int grain = call.batch_grain(b), parts = ceil_div(b.blocks, grain);
    if (later) th.barrier();
    for (Jobs jobs(th, HEADS); jobs.next();) call.lower(b, jobs.at);
    th.barrier();
    for (Jobs jobs(th, b.count * parts); jobs.next();)
      call.absorbed(few, b, b.at[jobs.at / parts], grain, jobs.at % parts);
    th.barrier();
    for (Jobs jobs(th, HEADS); jobs.next();) call.raise(few, b, grain, jobs.at);
  }
}
}  // namespace $symbol
"""
