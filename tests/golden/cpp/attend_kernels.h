// Attend: causal grouped-query attention over the paged cache.
#pragma once
#include "pool.h"
#include "attention.h"

namespace mill {

// out[t, h] = softmax_j(q[t, h] . key[j, h / GROUP] * 0.25f) value[j, h / GROUP]
// over keys p - 70 < j <= p for a query at position p;  q [rows, 4, 16], out [rows, 4, 16],
// cache row: keys [2, 16], values [2, 16]
namespace attend_h4_kv2_d16_v16_int8_window70 {
constexpr int HEADS = 4, HEADS_KV = 2, GROUP = HEADS / HEADS_KV;
constexpr int DIM = 16, VALUE = 16, WINDOW = 70, ROW_BYTES = 80;
constexpr float SCALE = 0.25f, SOFTCAP = 0.0f;
using Cache = CacheInt8;
constexpr int SIZE = sizeof(Cache::Value);
using Math = ShortMath;
using Inputs = Math::Panel::Inputs;
constexpr int PITCH = round_up(VALUE, STEP), SLOT_ROWS = 4096;
constexpr size_t ROW = Inputs::bytes(DIM);

// A tile is some tokens of a sequence, a job some of its kv heads (one, unless rows are few) and a part of
// its keys.  A job's rows are in the order of kv heads, tokens, and the GROUP heads of a kv head.
constexpr int TOKENS = max(1, 64 / GROUP), ROWS = TOKENS * GROUP, PANELS = panels(ROWS);
constexpr int FEW_TOKENS = FEW_ROWS / GROUP;  // of a sequence whose keys, not queries, fill the lanes

// Queries fill the lanes: the rows of one kv head are panels, which multiply a block of keys.
using BlockKeys = KeyRows<Math, Cache, DIM, compete(ROW_BYTES)>;
using BlockValues = KeyRows<Math, Cache, VALUE, compete(ROW_BYTES)>;
constexpr size_t MANY_LOCAL = BlockKeys::BYTES + BlockValues::BYTES + BlockScratch::bytes(1) +
                              Scratch::sizes<uint8_t>(PANEL * ROW, PANELS * PANEL * ROW);

// Keys fill the lanes: 16 of them are a panel, which multiplies the few rows of its kv head.  A panel of
// rows for the softmax holds as many kv heads as fit, so more than half of it is in use.
using PanelKeys = KeyRows<Math, Cache, DIM, false, PANEL>;
using PanelValues = KeyRows<Math, Cache, VALUE, false, PANEL>;
constexpr int FEW_PANELS = ceil_div(ROWS, PANEL / 2);
constexpr size_t FEW_LOCAL = PanelKeys::BYTES + PanelValues::BYTES + BlockScratch::bytes(FEW_PANELS) +
                             Scratch::sizes<uint8_t>(ROWS * ROW, PANEL * ROW) +
                             Scratch::sizes<float>((ROWS + PANEL) * PANEL);

constexpr size_t SHARED = Partial::bytes(SLOT_ROWS, PITCH);
constexpr size_t LOCAL = 3 * Partial::bytes(ROWS, PITCH) +
                         Scratch::sizes<float>(ROWS + PANEL, ROWS + PANEL, ROWS) +
                         larger(MANY_LOCAL, FEW_LOCAL);

struct Call {
  Thread &th;
  const tm_args &a;
  Rows<float> q, out;
  const float *sinks, *slopes;
  const void *cache;
  Partial slots;

  Partial slot(const Tile &tile, int kv, int parts, int i) const {
    return slots.row((tile.row * parts + i * tile.tokens) * HEADS + kv * tile.tokens * GROUP);
  }
  const uint8_t *row_at(const Tile &tile, int position) const {
    return cache_row(a, cache, ROW_BYTES, tile.sequence, position);
  }
  static Span<Cache> key_at(int kv) { return {kv * DIM * SIZE, DIM, DIM, 64 + 4 * kv}; }
  static Span<Cache> value_at(int kv) {
    return {(HEADS_KV * DIM + kv * VALUE) * SIZE, VALUE, VALUE, 72 + 4 * kv};
  }

  // Part i of a tile's keys, [i * grain, (i + 1) * grain) blocks from its first on, and `heads` kv heads.
  void attend(const Queries &queries, const TileBatch &b, const Tile &tile, int kv, int heads, int grain,
              int i) const {
    const int parts = ceil_div(b.blocks, grain), begin = queries.begin_of(tile) + i * grain;
    const int end = min(begin + grain, queries.end_of(tile)), each = tile.tokens * GROUP, rows = heads * each;
    if (begin >= end) return;
    Scratch scratch{th.local};
    const Partial span = Partial::take(scratch, ROWS, PITCH), block = Partial::take(scratch, ROWS, PITCH);
    const Partial own = Partial::take(scratch, ROWS, PITCH);
    const Partial all = parts == 1 ? own : slot(tile, kv, parts, i);
    float *newest = scratch.take<float>(ROWS + PANEL), *slope = scratch.take<float>(ROWS + PANEL);
    int32_t *position = scratch.take<int32_t>(ROWS);
    const float *x[ROWS];
    for (int k = kv, r = 0; k < kv + heads; k++)
      for (int t = 0; t < tile.tokens; t++)
        for (int h = k * GROUP; h < (k + 1) * GROUP; h++, r++) {
          x[r] = q[tile.first + t] + h * DIM;
          position[r] = a.positions[tile.first + t];
          if (slopes) slope[r] = slopes[h];
        }
    // keys_of(base, count, logits, result) attends to keys [base, base + count); logits(r, n) are of rows
    // [r, r + n).
    const auto join = [&](auto &&keys_of) {
      const int from = max(begin, queries.oldest_of(tile)), last = a.positions[tile.first] + tile.tokens;
      join_blocks(from, end, all, span, block, rows, [&](int at, const Partial &result) {
        const int base = at * KEYS, count = min(KEYS, last - base);
        for (int r = 0; r < rows; r++) newest[r] = (float)(position[r] - base);
        const auto logits = [&](int r, int n) {
          const float *slope_at = slopes ? slope + r : nullptr;
          return Logits{count, min(n, rows - r), newest + r, SCALE, SOFTCAP, WINDOW, slope_at};
        };
        keys_of(base, count, logits, result);
      });
    };
    if (queries.most <= FEW_TOKENS)
      few(scratch, tile, kv, heads, x, join);
    else
      many(scratch, tile, kv, x, join);
    for (int k = 0; parts == 1 && k < heads; k++) finish(tile, kv + k, all.row(k * each));
  }

  template <class Join>
  void many(Scratch scratch, const Tile &tile, int kv, const float *const *x, Join &&join) const {
    const int rows = tile.tokens * GROUP, end = a.positions[tile.first] + tile.tokens;
    BlockKeys keys(scratch);
    BlockValues values(scratch);
    const BlockScratch space = BlockScratch::take(scratch, 1);
    uint8_t *row = scratch.take<uint8_t>(PANEL * ROW);
    uint8_t *panel = scratch.take<uint8_t>(PANELS * PANEL * ROW);
    for (int r = 0; r < rows; r++) {
      Inputs::pack(row + r % PANEL * ROW, x[r], DIM);
      if ((r + 1) % PANEL == 0 || r + 1 == rows) panel_of_rows(row, ROW, panel + r / PANEL * PANEL * ROW);
    }
    join([&](int base, int count, auto &&logits, const Partial &result) {
      const Span<Cache> key = key_at(kv), value = value_at(kv);
      const int left = end - base - KEYS;
      for (int j = 0; j < count; j++) {
        const uint8_t *from = row_at(tile, base + j);
        keys.set(j, from, key);
        values.set(j, from, value);
        if (j < left) {  // rows of the next block: too far apart for the hardware
          const uint8_t *next = row_at(tile, base + KEYS + j);
          prefetch(next + key.at, DIM * SIZE);
          prefetch(next + value.at, VALUE * SIZE);
        }
      }
      for (int r = 0; r < rows; r += PANEL)
        attend_block<Math>({panel + r * ROW, keys.at, values.at, DIM, VALUE, logits(r, PANEL)}, space,
                           result.row(r), true);
    });
  }

  // Rows of the cache are read once for all heads, 16 at a time: their keys, and after the softmax of the
  // block their values.
  template <class Join>
  void few(Scratch scratch, const Tile &tile, int kv, int heads, const float *const *x, Join &&join) const {
    const int each = tile.tokens * GROUP, rows = heads * each, end = a.positions[tile.first] + tile.tokens;
    const int fit = PANEL / each, lanes = fit * each;
    PanelKeys keys(scratch);
    PanelValues values(scratch);
    const BlockScratch space = BlockScratch::take(scratch, FEW_PANELS);
    uint8_t *row = scratch.take<uint8_t>(ROWS * ROW), *panel = scratch.take<uint8_t>(PANEL * ROW);
    float *scores = scratch.take<float>((ROWS + PANEL) * PANEL);
    const uint8_t *queries[ROWS];
    for (int r = 0; r < rows; r++) {
      Inputs::pack(row + r * ROW, x[r], DIM);
      queries[r] = row + r * ROW;
    }
    const typename Math::Panel w{{panel, nullptr, PANEL, DIM}};
    join([&](int base, int count, auto &&logits, const Partial &result) {
      for (int j = 0; j < count; j += PANEL) {
        const int n = min(PANEL, count - j);
        const bool last = j + PANEL >= count;
        const uint8_t *from = row_at(tile, base + j), *next = row_at(tile, base + (last ? 0 : j + PANEL));
        for (int k = 0; k < heads; k++) {
          const Span<Cache> key = key_at(kv + k), later = last ? value_at(kv + k) : key;
          for (int r = 0; r < PANEL; r++) {
            keys.set(r, from + min(r, n - 1) * ROW_BYTES, key);
            prefetch<2>(next + r * ROW_BYTES + later.at, later.width * SIZE);
          }
          panel_of_rows(keys.at, ROW, panel);
          product<typename Math::Panel, GROUP>(w, 0, queries + k * each, each, scores + k * each * PANEL,
                                               PANEL);
        }
        for (int r = 0; r < rows; r += lanes)
          panel_of_rows((const uint8_t *)(scores + r * PANEL), PANEL * 4,
                        (uint8_t *)(space.panel(r / lanes).scores + j * PANEL));
      }
      for (int r = 0; r < rows; r += lanes)
        softmax<Math>(logits(r, lanes), space.panel(r / lanes), result.row(r), true);
      for (int j = 0; j < count; j += PANEL) {
        const int n = min(PANEL, count - j);
        const bool last = j + PANEL >= count;
        const int after = base + (last ? KEYS : j + PANEL);
        const uint8_t *from = row_at(tile, base + j), *next = after < end ? row_at(tile, after) : from;
        for (int k = 0; k < heads; k++) {
          const Span<Cache> value = value_at(kv + k), later = last ? key_at(kv + k) : value;
          for (int r = 0; r < PANEL; r++) {
            if (r < n) values.set(r, from + r * ROW_BYTES, value);
            prefetch<2>(next + r * ROW_BYTES + later.at, later.width * SIZE);
          }
          const uint8_t *p = space.panel(k / fit).p + (j / Math::UNIT * PANEL + k % fit * each) * 4;
          mix<Math, GROUP>(values.at, n, p, VALUE, each, result.row(k * each), j == 0);
        }
      }
    });
  }

  void finish(const Tile &tile, int kv, const Partial &all) const {
    for (int r = 0; r < tile.tokens * GROUP; r++) {
      const int head = kv * GROUP + r % GROUP;
      const Partial mine = all.row(r);
      const float scale = inverse_total(*mine.peak, *mine.total);
      float *to = out[tile.first + r / GROUP] + head * VALUE;
      for (int i = 0; i < VALUE; i += LANES) store_n(to + i, load(mine.sums + i) * scale, VALUE - i);
    }
  }
  void finish_slots(const Queries &queries, const TileBatch &b, const Tile &tile, int kv, int grain) const {
    const auto part = [&](int i) { return slot(tile, kv, ceil_div(b.blocks, grain), i); };
    const int blocks = queries.end_of(tile) - queries.begin_of(tile);
    join_slots(ceil_div(blocks, grain), grain, tile.tokens * GROUP, part);
    finish(tile, kv, part(0));
  }

  // All tiles of the queries; `later` says that jobs went before.
  void run(Queries queries, bool &later) const {
    for (TileBatch b; queries.next(b); later = true) {
      int heads = queries.most <= FEW_TOKENS ? min(HEADS_KV, max(1, ROWS / (b.longest * GROUP))) : 1;
      const int tiles = b.count * ceil_div(HEADS_KV, heads);
      const int grain = grain_of(tiles, b.blocks, SLOT_ROWS / (b.tokens * HEADS), th.count);
      const int parts = ceil_div(b.blocks, grain);
      while (th.count > 1 && heads > 1 && b.count * ceil_div(HEADS_KV, heads) * parts < 4 * th.count)
        heads = ceil_div(heads, 2);
      const int shares = ceil_div(HEADS_KV, heads);
      if (later) th.barrier();
      for (Jobs jobs(th, b.count * shares * parts); jobs.next();) {
        const int at = jobs.at / parts, kv = at % shares * heads;
        attend(queries, b, b.at[at / shares], kv, min(heads, HEADS_KV - kv), grain, jobs.at % parts);
      }
      if (parts == 1) continue;
      th.barrier();
      for (Jobs jobs(th, b.count * HEADS_KV); jobs.next();)
        finish_slots(queries, b, b.at[jobs.at / HEADS_KV], jobs.at % HEADS_KV, grain);
    }
  }
};

TM_NOINLINE void run(Thread &th, int rows, Rows<float> q, const void *cache, Rows<float> out) {
  const tm_args &a = *th.args;
  Scratch shared{th.shared};
  const Call call{th, a, q, out, nullptr, nullptr, cache, Partial::take(shared, SLOT_ROWS, PITCH)};
  bool later = false;
  call.run({a, TOKENS, MAX_ROWS, FEW_TOKENS + 1, MAX_ROWS, WINDOW}, later);
  call.run({a, TOKENS, MAX_ROWS, 1, FEW_TOKENS, WINDOW}, later);
}
}  // namespace attend_h4_kv2_d16_v16_int8_window70

}  // namespace mill
